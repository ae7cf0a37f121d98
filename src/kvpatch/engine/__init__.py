"""The engine: prefill, decode, score. It alone holds slabs, the buffers that change in place."""
