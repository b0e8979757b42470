"""The entry point of vLLM (`vllm.general_plugins`): with `KVSPLICE_VLLM` set, an engine keeps the rows of that splice.

vLLM calls `register` in each of its processes. Without the variable nothing happens, and nothing is imported.
"""

import logging
import math
from typing import Any


logger = logging.getLogger(__name__)

# By kind of platform the backend of ours, and what it takes the place of: all those that vLLM may choose there for MLA.
_CPU = "kvsplice_hf.vllm.backend.SplicedMLABackend", ("CPU_MLA", "AMX_MLA")
_CUDA = (
    "kvsplice_hf.vllm.cuda.SplicedCudaMLABackend",
    ("FLASHINFER_MLA", "TOKENSPEED_MLA", "CUTLASS_MLA", "FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA"),
)
# The same for ordinary attention, which GPUs are refused for.
_HEADS = "kvsplice_hf.vllm.heads_backend.SplicedHeadsBackend", ("CPU_ATTN",)
_PATCHED = "check_and_update_config"
NO_OWN_ROTATION = "-rotary_embedding"
# Tokens of a page where first tokens are exact, and nobody asks for another size: at least and at most.
_SMALLEST_PAGE, _LARGEST_PAGE = 128, 512
# Rows that take as many bytes as one exact token, about: packed rows are made to have a quarter of the bytes or so.
_ROWS_OF_EXACT_TOKEN = 4


def register() -> None:
    """Have vLLM use our backend for the kind of layers that the splice is of, where the environment names one.

    May be called again.

    Raises:
        CheckpointError: there is no splice in the folder, or it is damaged.
        UnsupportedError: it is of MLA in some layers, and of ordinary attention in others.
    """
    from kvsplice_hf.vllm.ordinary import is_of_heads
    from kvsplice_hf.vllm.start import folder_asked_for, tell_of_release

    folder = folder_asked_for()
    if folder is None:
        return
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    tell_of_release(vllm.__version__)
    mla = _CUDA if current_platform.is_cuda() else _CPU
    backend, replaced = _HEADS if is_of_heads(folder) else mla
    for stock in replaced:
        register_backend(AttentionBackendEnum[stock], backend)
    _forget_chosen_backends()
    if _PATCHED not in vars(current_platform):
        setattr(current_platform, _PATCHED, _CheckedUpdate(current_platform, folder))


def unregister() -> None:
    """Undo `register` in this process; engines that run are not touched."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    for stock in (*_CPU[1], *_CUDA[1], *_HEADS[1]):
        AttentionBackendEnum[stock].clear_override()
    _forget_chosen_backends()
    vars(current_platform).pop(_PATCHED, None)


def _forget_chosen_backends() -> None:
    """Have vLLM choose backends anew: it keeps which one it chose for layers of a kind, also after one was replaced.

    That matters where one process makes engines with a splice and without.
    """
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()


class _CheckedUpdate:
    """`check_and_update_config` of the platform, and our checks behind it.

    For MLA on a CPU the platform fixes the size of pages, and turns prefix caching and chunked prefill off, because its
    own backend has neither. Ours has both: what was asked for is put back.
    """

    def __init__(self, platform: Any, folder: Any) -> None:
        self._update, self._folder = getattr(platform, _PATCHED), folder

    def __call__(self, vllm_config: Any) -> None:
        from kvsplice_hf.code.files import read_splice_files
        from kvsplice_hf.vllm.start import require_servable

        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        prefixes, size = cache.enable_prefix_caching, cache.block_size
        is_cpu = vllm_config.device_config.device_type == "cpu"
        chunked, at_once = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens
        self._update(vllm_config)
        if vllm_config.model_config is None:
            return
        cache.enable_prefix_caching = prefixes
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = chunked, at_once
        if cache.user_specified_block_size:
            cache.block_size = size
        elif sinks := read_splice_files(self._folder).config.sink_tokens:
            cache.block_size = tokens_of_page(sinks, vllm_config.model_config.max_model_len)
            cache.user_specified_block_size = not is_cpu  # or workers on GPUs take what their backend prefers
        if not is_cpu:
            _leave_out_graphs(vllm_config)
        elif vllm_config.model_config.use_mla:
            _leave_out_rotation_of_cpus(vllm_config)
        require_servable(vllm_config, self._folder)


def tokens_of_page(sinks: int, longest: int) -> int:
    """How many tokens a page gets where nobody says so: a power of two.

    Each page has room for `sinks` exact tokens, which costs the less the larger pages are; and half of the last page of
    a sequence is empty on average, which costs the more. For sequences of L tokens, and e rows in place of what is
    exact, pages of sqrt(2 e L) tokens cost least. Those that fill a cache are long, so `longest` is taken for L.

    Args:
        sinks: exact first tokens of each sequence.
        longest: tokens that a sequence may have (`max_model_len`).
    """
    best = math.sqrt(2 * _ROWS_OF_EXACT_TOKEN * sinks * longest)
    return min(max(2 ** round(math.log2(best)), _SMALLEST_PAGE), _LARGEST_PAGE)


def _leave_out_rotation_of_cpus(vllm_config: Any) -> None:
    """Have plain RoPE rotated by PyTorch.

    vLLM 0.32.0 hands its operation for CPUs queries of three dimensions, and it rotates other numbers of them than it
    should: a model with MLA and plain RoPE then computes something else, without an error (docs/serving.md). RoPE of
    DeepSeek's own kind (yarn) does not come there.
    """
    operations = vllm_config.compilation_config.custom_ops
    if NO_OWN_ROTATION not in operations:
        operations.append(NO_OWN_ROTATION)


def _leave_out_graphs(vllm_config: Any) -> None:
    """Have no step captured as a CUDA graph.

    The backend says of itself that it cannot be captured, but vLLM 0.32.0 stores the rows of new tokens in an operation
    of its own. With graphs that Inductor divides, or that are broken at attention alone, it would be captured without
    what a step knows, and replayed as nothing.
    """
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode != CUDAGraphMode.NONE:
        logger.info("CUDA graphs are left out: steps on spliced rows cannot be captured.")
    compilation.cudagraph_mode = CUDAGraphMode.NONE
