"""Many processes on one plan: claims, workers, preemption, quarantine, merging, and the torture that tests them."""
