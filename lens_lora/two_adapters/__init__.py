"""Two adapters, or one through its training, beside one another; and mending one."""
