"""Reasons for which the format's loops refuse a row, as they return them; `builder` and `reader` say them in words."""

OK, BAD_VALUE, BAD_SUM, BAD_ORDER, BAD_CODE, BAD_MASS, BAD_COUNT, BAD_COUNT_OVER, BAD_GAP_OVER = range(9)
