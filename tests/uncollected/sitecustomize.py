"""On the path of a process that starts from nothing: what it imports is no garbage, and to look for
it takes a seventh of the time."""

import gc

gc.disable()
