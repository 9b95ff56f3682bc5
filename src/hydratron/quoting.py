"""Names on Hydra's command line, whose grammar gives commas, braces, quotes and = a meaning."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def quoted(text: str) -> str:
    """Return the value that Hydra and OmegaConf read as `text`, whatever is in it."""
    return QuotedString(text.replace("${", "\\${"), Quote.single).with_quotes()


def plain(value: str) -> str:
    """Return the string that Hydra reads `value` as; itself where Hydra would read no string."""
    try:
        read = OverridesParser.create().parse_override(f"name={value}").value()
    except HydraException:
        return value
    return read if isinstance(read, str) else value
