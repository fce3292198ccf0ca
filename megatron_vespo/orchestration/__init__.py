"""Ray: cluster, actors, the loops, and what every end of a run leaves behind (nothing)."""

import os

# Ray's own switches, read when it is imported. Without clusters of hosts all of its servers listen on loopback only.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
