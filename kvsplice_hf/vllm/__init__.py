"""Serving with vLLM: MLA layers of an engine keep the rows of a saved splice in its paged cache (docs/serving.md).

vLLM finds `plugin.register` by an entry point. Only programs import this room, and only `backend`, `commands`, `cuda`,
`mla` and `plugin` import vLLM.
"""
