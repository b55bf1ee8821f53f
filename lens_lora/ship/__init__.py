"""Is what answers there what was trained here?"""
