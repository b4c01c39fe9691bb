"""Render a recipe as KubeRay manifests, check them offline, apply them."""
