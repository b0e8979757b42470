"""Serving with vLLM: MLA layers of an engine keep the rows of a saved splice in its paged cache (docs/serving.md).

vLLM finds `plugin.register` by an entry point. Nothing else imports this room, and only `backend` and `plugin` import
vLLM.
"""
