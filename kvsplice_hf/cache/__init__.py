"""Cache layers that hold rows, the exact first tokens beside them, and pages of rows for continuous batching."""
