"""Serving with vLLM: layers of an engine keep the rows of a saved splice in its paged cache (docs/serving.md).

vLLM finds `plugin.register` by an entry point. Only programs import this room, and only `backend`, `commands`, `cuda`,
`heads_backend`, `mla` and `plugin` import vLLM.
"""
