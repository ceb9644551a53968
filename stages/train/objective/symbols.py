"""What a byte choice may be, beyond the 256 bytes and END of `schemas.arrays`."""

HEAD_SYMBOLS = 260
"""256 bytes, END (slot 0 of the student's EOS token), STOP and CONTROL, and one that is never a target (the paper's
heads have three that are not)."""
STOP = 257
"""The token ends at this node."""
CONTROL = 258
"""Ids that carry no bytes and end no document."""
