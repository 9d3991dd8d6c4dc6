"""Stage one: pictures in, cache out (mcm-cache)."""
