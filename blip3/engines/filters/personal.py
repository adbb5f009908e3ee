# SPDX-License-Identifier: Apache-2.0
"""Personal data in texts: e-mail addresses, phone numbers, numbers of payment cards.

Names and addresses are not found: that takes a model of the language.
"""

import re

from ..packages import PHONENUMBERS

_EMAIL = re.compile(r"[\w.+%-]+\s?@\s?(?:[a-z0-9-]+\.)+[a-z]{2,}", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w]|\.\d)")


def personal_data(text: str, region: str = "") -> list[str]:
    """Name the kinds of personal data in a text: `email`, `card`, `phone`.

    Args:
        text: of one line, or of several.
        region: two letters of the country whose phone numbers may be written without its code; empty for none.

    Raises:
        ImportError: if phonenumbers is not installed.

    >>> personal_data("Write to jo@example.org"), personal_data("4111 1111 1111 1111")
    (['email'], ['card'])
    """
    found = {
        "email": _EMAIL.search(text) is not None,
        "card": any(is_card(match[0]) for match in _CARD.finditer(text)),
        "phone": any(map(str.isdigit, text)) and _has_phone(text, region),
    }
    return [kind for kind, is_there in found.items() if is_there]


def is_card(text: str) -> bool:
    """Say whether digits can be a card's number: 13 to 19 of them, with the check digit of Luhn's rule.

    >>> is_card("4111 1111 1111 1111"), is_card("4111 1111 1111 1112"), is_card("0000 0000 0000 0000")
    (True, False, False)
    """
    digits = [int(mark) for mark in text if mark.isdecimal()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1 or digits[0] == 0:
        return False
    doubled = [digit if index % 2 == 0 else sum(divmod(2 * digit, 10)) for index, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _has_phone(text: str, region: str) -> bool:
    try:
        import phonenumbers
    except ImportError as error:
        raise PHONENUMBERS.missing(error) from error
    return any(True for _ in phonenumbers.PhoneNumberMatcher(text, region.upper() or None))


def check_region(region: str) -> None:
    """Refuse a country whose phone numbers are not known.

    Args:
        region: two letters; empty for none.

    Raises:
        ImportError: if phonenumbers is not installed.
        ValueError: if it does not know the country.
    """
    PHONENUMBERS.check()
    import phonenumbers

    if region and region.upper() not in phonenumbers.SUPPORTED_REGIONS:
        raise ValueError(
            f"The country of phone numbers is {region!r}, but phonenumbers does not know it. It was probably written "
            "in full, or as a number: give the two letters of ISO 3166, such as us."
        )
