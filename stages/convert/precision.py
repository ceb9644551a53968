"""What the settings of a conversion say of a shard's precision."""

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Convert
from bytecache.schemas.shard.builder import LEAST_RATE, PRECISIONS, Precision


def precision_of(settings: Convert) -> Precision:
    """The precision that was chosen, at the rate that was. Raises ConfigError for a rate that no shard knows."""
    precision = PRECISIONS[settings.precision]
    if 0 < settings.rate < LEAST_RATE:
        raise ConfigError(
            f"convert.rate = {settings.rate:g} is below the least that a shard knows, {LEAST_RATE:g}; "
            "raise it, or set 0 to let convert.precision decide"
        )
    return precision._replace(rate=settings.rate) if settings.rate else precision
