"""File formats and settings: the contracts between stages and with strangers. Imports nothing of ours."""
