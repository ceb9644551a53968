"""The work itself: token bytes, path masses, the lattice, streams, the student. Imports only `schemas`."""
