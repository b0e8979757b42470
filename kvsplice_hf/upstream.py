"""Everything this package knows about the insides of transformers, with the releases for which it holds.

A patched model lives inside code that changes every week. So what is assumed about that code is said here, once, and
the rest of the package asks. Wherever possible a fact is looked up in the installed release instead of being derived
from its number.

What is relied on, and since when:

| fact | releases |
|---|---|
| MLA modules hand `[B, 1, T, R]` and `[B, 1, T, P]` to `update`, and what it returns to `expand_kv` | 5.15 on |
| those with a sparse-attention indexer do as well | 5.18 on |
| the cache reaches a module as `past_key_values` | up to 5.23 |
| the cache reaches a module as `cache`; outputs carry `cache`; mask functions take `cache` | 5.24 on |
| `update` is called without further arguments | up to 5.23 |
| `update` gets `kwargs`, what the module was called with | 5.24 on |
| `position_embeddings` reach a module: `(cos, sin)`, or complex numbers in DeepSeek-V2 | 5.15 on |
| the attention function is looked up by `config._attn_implementation` in `ALL_ATTENTION_FUNCTIONS` | all |
| a name without a mask function of its own gets no mask | all |
| continuous batching hands over its pages as `cache`, with `read_index` and `write_index` | 5.23 on |
| growing cache layers let go of their rows on `reset` (before: zeros, and go on behind them) | 5.18 on |
| static cache layers can be cropped; those with a window keep whether they can in `_is_croppable` | 5.24 on |

`docs/following_transformers.md` tells what to do when a new release comes out.

Legend: `B` batch, `T` new tokens, `R` kv_lora_rank, `P` qk_rope_head_dim.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import transformers
from packaging.version import Version

from kvsplice_hf.errors import CacheMismatchError, TransformersTooOldError, UpstreamChangedError


logger = logging.getLogger(__name__)

# Transformers caches latents since 5.15.0; the models with a sparse-attention indexer do since 5.18.0.
MIN_TRANSFORMERS = "5.15.0"
MIN_TRANSFORMERS_DSA = "5.18.0"
# The release whose paged cache `paged.py` was written for.
MIN_TRANSFORMERS_PAGED = "5.23.0"
# The newest release that passes all tests; `setup.cfg` bounds transformers by the minor release after it.
NEWEST_TESTED = "5.24.0"
INSTALLED = transformers.__version__

if Version(INSTALLED) < Version(MIN_TRANSFORMERS):  # before imports below that fail with less to say
    raise TransformersTooOldError(
        f"kvsplice_hf needs transformers>={MIN_TRANSFORMERS}, which caches the latents of MLA models; {INSTALLED} is "
        f"installed. Install a newer one: pip install 'transformers>={MIN_TRANSFORMERS},<={NEWEST_TESTED}'."
    )

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.utils import TransformersKwargs  # noqa: E402


ContinuousBatchingManager: Any = None  # the paged cache of older releases is built otherwise
if Version(INSTALLED) >= Version(MIN_TRANSFORMERS_PAGED):
    from transformers.generation.configuration_utils import ContinuousBatchingConfig as ContinuousBatchingConfig
    from transformers.generation.continuous_batching import continuous_api
    from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION as FULL_ATTENTION

    ContinuousBatchingManager = continuous_api.ContinuousBatchingManager

# `generate_batch` and the context manager of continuous batching go through this method of a model.
BATCHING_METHOD = "init_continuous_batching"
_PERSISTENT_MANAGER = "_cached_continuous_batching_manager"

# Names under which a module or a model takes the cache, the current one first.
CACHE_NAMES = ("cache", "past_key_values", "layer_past")
# The one that the installed release uses itself. The other one may be understood, but with a warning.
CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)
# Further keyword arguments of `update` that are known, and known not to change what is to be stored.
_UPDATE_ARGUMENTS = frozenset({"kwargs"})
# Keyword arguments of attention functions that change no score.
_PLAIN_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"use_cache", "cache_position", "return_dict"}
# Those of continuous batching, which say where the tokens of each request are, and what is done with the logits.
PAGED_ARGUMENTS = frozenset({"read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"})
# Under which an attention module takes how its keys are rotated, and what positions they have.
POSITION_EMBEDDINGS, POSITION_IDS = "position_embeddings", "position_ids"
# What a cache layer knows about itself that its constructor is not told.
_LAYER_SETTINGS = ("_is_croppable",)


# ---------------------------------------------------------------------------------------------------- releases


def installed_and_tested() -> str:
    """Both versions, for messages."""
    return f"transformers {INSTALLED} is installed, kvsplice_hf is tested up to {NEWEST_TESTED}"


@functools.cache
def warn_if_newer_than_tested() -> None:
    """Warn, once per process, about a release that this package was not tested with."""
    if Version(INSTALLED).release[:2] > Version(NEWEST_TESTED).release[:2]:
        logger.warning(
            "transformers %s is newer than %s, the newest release that this version of kvsplice_hf was tested with. "
            "What it needs of the attention modules is checked, and a change there raises an error. To be safe: pip "
            "install 'transformers<=%s', or update kvsplice_hf.",
            INSTALLED,
            NEWEST_TESTED,
            NEWEST_TESTED,
        )


def changed(module_name: str, what: str) -> UpstreamChangedError:
    """The error to raise where a module does not do what is relied on.

    Args:
        module_name: path and class of the module.
        what: what was found, and what was needed.
    """
    return UpstreamChangedError(
        f"{module_name}: {what} Nothing was computed on a cache that is not compressed. {installed_and_tested()}. "
        f"Install a tested release (pip install 'transformers<={NEWEST_TESTED}') or a newer kvsplice_hf, or call "
        "unpatch_model(model) to run without the splice."
    )


# ------------------------------------------------------------------------------------- forward of an MLA module


class ForwardArguments(NamedTuple):
    """Where the forward of an attention module takes what the patch has to see: positions among its arguments.

    Attributes:
        names: its parameters, without `self`.
        cache: the name of the one that holds the cache.
    """

    names: tuple[str, ...]
    cache: str

    def get(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value of the parameter `name` in a call with `args` and `kwargs`, or None."""
        return argument(self.names, name, args, kwargs)

    def replaced(
        self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call with another value for the parameter `name`."""
        index = self.names.index(name)
        if index < len(args):
            return (*args[:index], value, *args[index + 1 :]), kwargs
        return args, {**kwargs, name: value}


def argument(names: tuple[str, ...], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The value of a parameter in a call with `args` and `kwargs` of a forward with the parameters `names`, or None."""
    if name in kwargs:
        return kwargs[name]
    index = names.index(name) if name in names else len(args)
    return args[index] if index < len(args) else None


def forward_parameters(module: Any) -> tuple[str, ...]:
    """The parameters of the forward of a module, without `self`."""
    return forward_parameters_of(type(module))


def caches_keys_and_values(cls: type) -> bool:
    """Whether the forward of a class hands states to the cache, and then to an attention function found by its name."""
    used = names_used(cls)
    by_name = {"update", "ALL_ATTENTION_FUNCTIONS", "_attn_implementation"} <= set(used) and "expand_kv" not in used
    return by_name and used.index("update") < used.index("ALL_ATTENTION_FUNCTIONS")


def read_forward(
    name: str, module: Any, needs_attention_by_name: bool = True, expands: bool = True
) -> ForwardArguments:
    """Check that the forward of an MLA module does what the patch relies on, without running it.

    `co_names` lists global and attribute names in the order in which a function first uses them, so that the order of
    two calls can be read off.

    Args:
        name: path of the module.
        module: the attention module.
        expands: whether it is an MLA module, which has to call `expand_kv`.
        needs_attention_by_name: whether the attention function has to be looked up by name, as for attention on codes.

    Raises:
        TransformersTooOldError: as `require_latent_cache`.
        UpstreamChangedError: it does something else than all releases known so far.
    """
    title = f"{name} ({type(module).__name__})"
    used, parameters = names_used(type(module)), forward_parameters_of(type(module))
    missing = " and ".join(word for word in ("update", "expand_kv")[: 1 + expands] if word not in used)
    if missing:
        raise changed(title, f"its forward does not call {missing}, so that codes would not be stored or read.")
    require_latent_cache(name, module)
    if needs_attention_by_name and not {"ALL_ATTENTION_FUNCTIONS", "_attn_implementation"} <= set(used):
        raise changed(title, "its forward does not look the attention function up by its name in the config.")
    absent = [needed for needed in ("hidden_states", "attention_mask") if needed not in parameters]
    caches = [known for known in CACHE_NAMES if known in parameters]
    if absent or not caches:
        needed = " and ".join([*absent, *([] if caches else [" or ".join(CACHE_NAMES)])])
        raise changed(title, f"its forward takes ({', '.join(parameters)}); {needed} is needed among them.")
    return ForwardArguments(parameters, caches[0])


def require_latent_cache(name: str, module: Any) -> None:
    """Refuse a module that expands first and caches afterwards.

    Args:
        name: path of the module.
        module: the attention module.

    Raises:
        TransformersTooOldError: it caches expanded keys and values, as sparse-attention models did before 5.18.
    """
    used = names_used(type(module))
    if "update" in used and "expand_kv" in used and used.index("update") > used.index("expand_kv"):
        raise TransformersTooOldError(
            f"{name} ({type(module).__name__}) caches expanded keys and values in transformers {INSTALLED}; it caches "
            f"latents, which can be spliced, since {MIN_TRANSFORMERS_DSA}. Install "
            f"transformers>={MIN_TRANSFORMERS_DSA}."
        )


def _forwards(cls: type) -> Iterator[Any]:
    """The forward of a class, below its decorators, and those of its bases that it may hand over to."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            yield inspect.unwrap(vars(base)["forward"])


def names_used(cls: type) -> tuple[str, ...]:
    """Names in the order in which the forward first uses them; that of a base, where the forward hands over to it."""
    names: tuple[str, ...] = ()
    for forward in _forwards(cls):
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if "expand_kv" in names or "forward" not in names:
            break
    return names


def forward_parameters_of(cls: type) -> tuple[str, ...]:
    """Parameters of the outermost forward that can be given by position or name, without `self`."""
    forward = next(_forwards(cls), None)
    if forward is None:
        return ()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds)[1:]


def find_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a call, known by what it is and not by what the argument is called.

    Raises:
        CacheMismatchError: there are two different ones.
    """
    if isinstance(found := kwargs.get(CACHE_NAME), Cache):
        return found
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    if any(cache is not caches[0] for cache in caches):
        raise CacheMismatchError("The attention module got two different caches. Give it one.")
    return caches[0] if caches else None


def with_cache(
    arguments: ForwardArguments, cache: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another cache, in the place of whatever it has under the names of one."""
    others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return arguments.replaced(arguments.cache, cache, args, others)


def other_cache(arguments: ForwardArguments, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a call without a `Cache` has in the place of one, or None."""
    given = (arguments.get(arguments.cache, args, kwargs), *(kwargs.get(name) for name in CACHE_NAMES))
    return next((value for value in given if value is not None), None)


def check_update_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check what else `update` of a cache layer was called with, beside the latent and the rotated key.

    Raises:
        UpstreamChangedError: there is something that no release known so far hands over. It may say what to store.
    """
    if args or any(name not in _UPDATE_ARGUMENTS for name in kwargs):
        extra = [f"{len(args)} further values" if args else "", *kwargs]
        raise changed(
            "a spliced cache layer",
            f"its `update` was called with {', '.join(filter(None, extra))}, which this version does not know.",
        )


# ------------------------------------------------------------------------------------------- models and outputs


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to a model or to `generate`, as the installed release calls it."""
    return {CACHE_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`, whatever the installed release calls it; None without one.

    Args:
        output: a `ModelOutput`, or the tuple of one.
    """
    if isinstance(output, Mapping):
        return next((output[name] for name in CACHE_NAMES if name in output), None)
    if isinstance(output, tuple):
        return next((value for value in output if isinstance(value, Cache)), None)
    return next((value for name in CACHE_NAMES if (value := getattr(output, name, None)) is not None), None)


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that a forward of ours was given under one of its two names, or None.

    Raises:
        ValueError: both names are used.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(f"Give the cache as `{CACHE_NAME}` only, not under two names.")
    return past_key_values if cache is None else cache


def output_with_cache(output_class: type, cache: Any, **fields: Any) -> Any:
    """An output of a model with `cache` under the name that the installed release uses."""
    return output_class(**cache_argument(cache), **fields)


def causal_mask(cache: Any, **kwargs: Any) -> Any:
    """`create_causal_mask` of transformers, with the cache as the installed release wants it.

    Args:
        cache: a `Cache`, None, or pages of continuous batching, which before 5.24 have no sizes to make a mask of.
        kwargs: the other arguments of `create_causal_mask`.
    """
    if CACHE_NAME == "past_key_values" and not isinstance(cache, Cache):
        cache = None
    return create_causal_mask(**cache_argument(cache), **kwargs)


def carry_layer_settings(stock: Any, layer: Any) -> None:
    """Give `layer`, which takes the place of the empty cache layer `stock`, what its constructor is not told."""
    for name in _LAYER_SETTINGS:
        if name in vars(stock):
            setattr(layer, name, vars(stock)[name])
    if getattr(stock, "record_past", False):  # assisted decoding asks for it before the first forward
        layer.activate_past_recording()


def drop_rows(layer: Any) -> None:
    """Finish the `reset` of a growing layer where the installed release has kept its rows."""
    layer.keys = layer.values = None
    layer.is_initialized = False
    if getattr(layer, "is_indexer_initialized", False):
        layer.indexer_keys, layer.is_indexer_initialized = None, False


# ------------------------------------------------------------------------------------------ attention functions


def attention_function(name: str) -> Callable[..., Any]:
    """The attention function that transformers knows under `name`."""
    return ALL_ATTENTION_FUNCTIONS[name]


def register_attention_function(name: str, function: Callable[..., Any], base: str) -> None:
    """Make an attention function known to transformers, with the masks of the function `base`.

    A name that is known already keeps its function.
    Without a mask function of the same name a module gets no mask at all, and no error.
    """
    if name in ALL_ATTENTION_FUNCTIONS:
        return
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def further_arguments(kwargs: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """Keyword arguments that an attention function got and that may change what it computes, but for those `known`."""
    return [n for n, value in kwargs.items() if value is not None and n not in known and n not in _PLAIN_ARGUMENTS]


# ------------------------------------------------------------------------------------------ continuous batching


def persistent_manager(model: Any) -> Any:
    """The manager that a model keeps between calls of `generate_batch`, or None."""
    return vars(model).get(_PERSISTENT_MANAGER)


def drop_persistent_manager(model: Any) -> None:
    """Stop and forget the manager that a model keeps between calls of `generate_batch`, if it keeps one."""
    if persistent_manager(model) is not None:
        model.destroy_cached_continuous_batching_manager()
