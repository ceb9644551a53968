"""Where models are: folders, the hub, packages that carry one."""
