"""`GPT2MLAConfig`: GPT-2's settings under GPT-2's names, and those of Multi-head Latent Attention.

Legend: `D` n_embd, `H` n_head, `R` kv_lora_rank, `P` qk_rope_head_dim, `N` qk_nope_head_dim, `V` v_head_dim.
"""

from typing import Any

from transformers import PreTrainedConfig

from kvsplice_hf.config import KVSpliceConfig
from kvsplice_hf.errors import ConfigError
from kvsplice_hf.upstream import CACHE_NAME


KV_LATENTS = ("shared", "separate", "separate_mlp")
_POSITIVE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_POSITIVE_OR_NONE = ("n_inner", "q_lora_rank", "mlp_latent_dim", "qk_nope_head_dim", "v_head_dim")
# A splice that is trained with the model starts from nothing, and the model learns to live with it from the first token
# on. `kvsplice` may say otherwise.
_BUILT_IN_DEFAULTS = {"init": "orthogonal", "sink_tokens": 0}


class GPT2MLAConfig(PreTrainedConfig):
    """Settings of a GPT-2 whose attention is Multi-head Latent Attention.

    GPT-2's own settings have GPT-2's names, meanings and defaults (`vocab_size`, `n_positions`, `n_embd`, `n_layer`,
    `n_head`, `n_inner`, `activation_function`, `resid_pdrop`, `embd_pdrop`, `attn_pdrop`, `layer_norm_epsilon`,
    `initializer_range`, `bos_token_id`, `eos_token_id`, `tie_word_embeddings`). The research's names (`d_model`,
    `n_heads`, `n_layers`, `d_latent`, `block_size`) are read and written as the same settings.

    Args:
        kv_lora_rank: R, numbers per token and layer that keys and values are made from; from 1 to H * (N + V).
        qk_nope_head_dim, v_head_dim: N and V; by default D / H.
        qk_rope_head_dim: P, even. 0: positions are learned, as in GPT-2. Above: there is no table of positions; each
            head's query and key get P rotated numbers, those of the key shared by all heads and cached beside the
            latent.
        rope_theta: base of the rotation.
        q_lora_rank: rank of a latent that queries are made from; None makes them from the hidden states.
        latent_norm: RMSNorm on the latents (that of the queries as well), as in DeepSeek's models.
        kv_latents: "shared" makes keys and values from all of the latent; "separate" makes keys from its first half and
            values from its second; "separate_mlp" is "separate" with a hidden layer of width D before the latents.
        mlp_latent_dim: width of the space that the MLP of each block works in; None for GPT-2's own MLP.
        queries_from_latent: queries are made from the latent of their token, as keys and values are. Experimental.
        reciprocal_layers: which layers have reciprocal attention, softmax(K Q^T) beside softmax(Q K^T): "all" or
            "last:n"; None: none. It needs `queries_from_latent`. Experimental.
        reciprocal_heads: in how many heads of those layers; None: in all.
        reciprocal_weight: the fixed weight of the reciprocal branch, above 0 and up to 1; None: it is mixed in by a
            coefficient that is learned and starts at 0.
        reciprocal_mlp: share of the hidden units of each MLP that read the attention output of their block (normalised)
            in place of the hidden state; from 0, GPT-2's MLP, to below 1. Experimental.
        kvsplice: fields of `KVSpliceConfig` by name, for a splice that is built in and trained with the model; None for
            no splice. It takes one of `compression_ratio` and `rank`; `init` is always "orthogonal", `sink_tokens` is 0
            if not given, and `layers` is set by `kvsplice_layers`.
        kvsplice_layers: which layers have the built-in splice: "all" or "last:n".

    Raises:
        ConfigError: a setting is out of its range, or contradicts another one.

    Examples:
        >>> GPT2MLAConfig(kv_lora_rank=256, kvsplice={"compression_ratio": 0.5, "use_layernorm": True})
    """

    model_type = "gpt2_mla"
    keys_to_ignore_at_inference = [CACHE_NAME]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        # names of the research
        "block_size": "n_positions",
        "d_latent": "kv_lora_rank",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "n_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = None  # type: ignore[assignment]  # filled in by __post_init__
    v_head_dim: int = None  # type: ignore[assignment]
    qk_rope_head_dim: int = 0
    rope_theta: float = 10000.0
    q_lora_rank: int | None = None
    latent_norm: bool = False
    kv_latents: str = "shared"
    mlp_latent_dim: int | None = None
    queries_from_latent: bool = False
    reciprocal_layers: str | None = None
    reciprocal_heads: int | None = None
    reciprocal_weight: float | None = None
    reciprocal_mlp: float = 0.0
    kvsplice: dict[str, Any] | None = None
    kvsplice_layers: str = "all"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._fill_head_sizes()
        self.validate_settings()

    def _fill_head_sizes(self) -> None:
        self._check_counts(_POSITIVE)
        if self.qk_nope_head_dim is not None and self.v_head_dim is not None:
            return
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"`n_embd` ({self.n_embd}) is not divisible by `n_head` ({self.n_head}). Change one of them, or give "
                "both `qk_nope_head_dim` and `v_head_dim`."
            )
        for name in ("qk_nope_head_dim", "v_head_dim"):
            if getattr(self, name) is None:
                setattr(self, name, self.n_embd // self.n_head)

    def validate_settings(self) -> None:
        """Check all settings against each other; the models call it again, since settings may be set one by one.

        Raises:
            ConfigError: see the class.
        """
        self._check_counts(_POSITIVE)
        self._check_counts(tuple(name for name in _POSITIVE_OR_NONE if getattr(self, name) is not None))
        self._check_latents()
        if not _is_int(self.qk_rope_head_dim) or self.qk_rope_head_dim < 0 or self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"`qk_rope_head_dim` is {self.qk_rope_head_dim!r}; it must be even, since numbers are rotated in "
                "pairs, or 0 for learned positions."
            )
        if not self.rope_theta > 0:
            raise ConfigError(f"`rope_theta` is {self.rope_theta!r}; it must be above 0.")
        self._check_queries_from_latent()
        self._check_reciprocal_attention()
        self._check_reciprocal_mlp()
        self.splice_config()

    def _check_counts(self, names: tuple[str, ...]) -> None:
        for name in names:
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ConfigError(f"`{name}` is {value!r}; it must be an integer of 1 or more.")

    def _check_latents(self) -> None:
        expanded = self.n_head * (self.qk_nope_head_dim + self.v_head_dim)
        queries = self.n_head * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        for name, most, what in (
            ("kv_lora_rank", expanded, "keys and values"),
            ("q_lora_rank", queries, "queries"),
            ("mlp_latent_dim", self.n_embd, "hidden states"),
        ):
            value = getattr(self, name)
            if value is None and name != "kv_lora_rank":
                continue
            if not _is_int(value) or not 1 <= value <= most:
                raise ConfigError(f"`{name}` is {value!r}; it must be from 1 to {most}, the size of the {what}.")
        if self.kv_latents not in KV_LATENTS:
            raise ConfigError(f"`kv_latents` is {self.kv_latents!r}; it must be one of {KV_LATENTS}.")
        if self.kv_latents != "shared" and self.kv_lora_rank % 2:
            raise ConfigError(
                f'`kv_lora_rank` is {self.kv_lora_rank}; with kv_latents="{self.kv_latents}" it must be even: keys are '
                "made from one half of the latent and values from the other."
            )

    def _check_queries_from_latent(self) -> None:
        if not isinstance(self.queries_from_latent, bool):
            raise ConfigError(f"`queries_from_latent` is {self.queries_from_latent!r}; it must be True or False.")
        if self.queries_from_latent and self.q_lora_rank is not None:
            raise ConfigError(
                f"`q_lora_rank` is {self.q_lora_rank}; it must be None with `queries_from_latent`, which makes queries "
                "from the latent of keys and values."
            )

    def _check_reciprocal_attention(self) -> None:
        heads, weight = self.reciprocal_heads, self.reciprocal_weight
        if self.reciprocal_layers is None:
            for name, value in (("reciprocal_heads", heads), ("reciprocal_weight", weight)):
                if value is not None:
                    raise ConfigError(f"`{name}` is {value!r}; it works with `reciprocal_layers`, which is None.")
            return
        self._reciprocal_layers()
        if heads is not None and (not _is_int(heads) or not 1 <= heads <= self.n_head):
            raise ConfigError(f"`reciprocal_heads` is {heads!r}; it must be from 1 to `n_head` ({self.n_head}).")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (is_number and 0 < weight <= 1):
            raise ConfigError(
                f"`reciprocal_weight` is {weight!r}; it must be above 0 and up to 1, the share of the reciprocal "
                "branch, or None for a learned coefficient."
            )
        if not self.queries_from_latent:
            raise ConfigError(
                "`reciprocal_layers` needs `queries_from_latent`: reciprocal attention reads the queries of past "
                "tokens, and only the latent of a token is cached."
            )

    def _reciprocal_layers(self) -> tuple[int, ...]:
        """The layers with reciprocal attention.

        Raises:
            ConfigError: they are not "all" or "last:n", or more than there are.
        """
        layers = self.reciprocal_layers
        try:
            if isinstance(layers, str) and not layers.startswith("fisher"):
                return KVSpliceConfig(layers=layers).select_layers(tuple(range(self.n_layer)))
        except ConfigError:
            pass  # it names a setting that is called otherwise here
        raise ConfigError(
            f'`reciprocal_layers` is {layers!r}; it must be "all" or "last:n" with n from 1 to {self.n_layer}, or None.'
        )

    def reciprocal_heads_of(self, layer_idx: int) -> int:
        """How many heads of a layer also attend with the roles of queries and keys exchanged."""
        if self.reciprocal_layers is None or layer_idx not in self._reciprocal_layers():
            return 0
        return self.n_head if self.reciprocal_heads is None else self.reciprocal_heads

    def _check_reciprocal_mlp(self) -> None:
        share = self.reciprocal_mlp
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share < 1:
            raise ConfigError(
                f"`reciprocal_mlp` is {share!r}; it must be the share of the MLP's hidden units that the attention "
                "feeds, from 0 (none) to below 1."
            )
        if share and not 0 < self.fed_by_attention() < self.mlp_width():
            raise ConfigError(
                f"`reciprocal_mlp` is {share!r}; that is {self.fed_by_attention()} of the MLP's {self.mlp_width()} "
                "hidden units, of which at least one must be fed by the attention, and one by the hidden state."
            )

    def mlp_width(self) -> int:
        """Hidden units of the MLP of each block."""
        return self.n_inner or 4 * (self.mlp_latent_dim or self.n_embd)

    def fed_by_attention(self) -> int:
        """How many of them read the attention output of their block."""
        return round(self.reciprocal_mlp * self.mlp_width())

    def splice_config(self) -> KVSpliceConfig | None:
        """The settings of the built-in splice, or None where there is none.

        Raises:
            ConfigError: the settings cannot be used for a splice that is built in, or do not fit the model.
        """
        if self.kvsplice is None:
            return None
        if not isinstance(self.kvsplice, dict):
            raise ConfigError(
                f"`kvsplice` is a {type(self.kvsplice).__name__}; it must be a dict of fields of KVSpliceConfig "
                'such as {"compression_ratio": 0.5}, or None.'
            )
        for name in ("layers", "layer_pattern"):
            if name in self.kvsplice:
                raise ConfigError(f"`kvsplice` holds {name!r}. Choose the layers with `kvsplice_layers`.")
        values = _BUILT_IN_DEFAULTS | self.kvsplice
        if values["init"] != _BUILT_IN_DEFAULTS["init"]:
            raise ConfigError(
                f'`kvsplice` asks for init={values["init"]!r}; a built-in splice starts "orthogonal", since there are '
                "no trained weights to start from. For a trained model use patch_model_with_kvsplice."
            )
        if not isinstance(self.kvsplice_layers, str) or self.kvsplice_layers.startswith("fisher"):
            raise ConfigError(f'`kvsplice_layers` is {self.kvsplice_layers!r}; it must be "all" or "last:n".')
        config = KVSpliceConfig.from_dict(values | {"layers": self.kvsplice_layers})
        if config.is_packed:
            raise ConfigError(
                "`kvsplice` needs `compression_ratio` or `rank`. Packed rows are fitted to a trained model: use "
                "patch_model_with_kvsplice on one without a built-in splice."
            )
        if config.transform == "spline":
            raise ConfigError(
                '`kvsplice` asks for transform="spline", which is fitted to vectors of a trained model: use '
                "patch_model_with_kvsplice on one without a built-in splice."
            )
        config.rank_for(self.kv_lora_rank, "the model")
        config.select_layers(tuple(range(self.n_layer)))
        return config


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
