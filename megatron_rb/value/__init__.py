"""Dense temporal value: hop labels, balanced sampling, reconstruction of progress, reward shaping; in numpy."""
