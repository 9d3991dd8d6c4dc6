"""Stage one, from pictures to a cache. Its interface is the program `mcm-cache`."""
