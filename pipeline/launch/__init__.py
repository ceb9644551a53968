"""Start workers of a plan: as local processes, on Ray, or through files for Slurm, SkyPilot and Kubernetes.

None of them shares out the work: each starts any number of equal `bytecache STAGE --worker` processes, which claim
units from the run folder (`pipeline.fleet`). So what a launcher forgets, kills or starts twice costs nothing but time.
"""
