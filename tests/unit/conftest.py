"""megatron-core may only be imported after the shims, whichever test a process happens to begin with."""

from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))
