"""bitsandbytes, imported without its advice.

On AVX512-BF16 hosts bitsandbytes 0.50 tells whoever imports it first to install ``kernels``, a package
that would then ask the hub. The logger is given its level back: nothing global is changed.
"""

import logging
from typing import Any

_chatty = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _chatty.level
_chatty.setLevel(logging.CRITICAL)
try:
    import bitsandbytes as bnb
finally:
    _chatty.setLevel(_level)

__all__ = ["bnb", "page_again"]


def page_again(optimizer: Any) -> None:
    """Give a paged optimizer, after its state was loaded, pages for it once more.

    bitsandbytes 0.50 loads every state into the card's own memory; a run that was planned with paged state
    would then hold it there. An optimizer that pages nothing is left as it is.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if not getattr(inner, "is_paged", False):
        return
    for parameter, state in inner.state.items():
        for name in ("state1", "state2"):
            if name in state and parameter.is_cuda:
                paged = inner.get_state_buffer(parameter, dtype=state[name].dtype)
                state[name] = paged.copy_(state[name])
