import sys

if sys.platform != "linux":  # they fork processes, limit their memory, and read /proc
    collect_ignore_glob = ["test_*.py"]
