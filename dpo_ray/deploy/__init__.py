"""Where a run goes: Ray Jobs on a cluster, manifests for Kubernetes, and the paths that all nodes must see."""
