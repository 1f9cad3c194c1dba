"""Points, cameras, episodes and the samples built from them, in numpy."""
