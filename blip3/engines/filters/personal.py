# SPDX-License-Identifier: Apache-2.0
"""Personal data in texts: e-mail addresses, phone numbers, numbers of payment cards.

Names and addresses are not found: that takes a model of the language.
"""

import itertools
import re

from ..packages import PHONENUMBERS

_EMAIL = re.compile(r"[\w.+%-]+\s?@\s?(?:[a-z0-9-]+\.)+[a-z]{2,}", re.IGNORECASE)
_GAP = r"[ \u00a0-]"
_BEFORE, _AFTER = rf"(?<![\w.])(?<!\b\d{{4}}{_GAP})", rf"(?!\w|\.\d|{_GAP}\d{{4}}\b)"
_PRINTED = [  # as cards print their numbers, and in one; a longer list of numbers of four digits is none
    re.compile(f"{_BEFORE}{groups}{_AFTER}")
    for groups in (
        r"\d{13,19}",
        *(rf"\d{{4}}({_GAP})\d{{4}}\1\d{{4}}\1{last}" for last in (r"\d", r"\d{4}", r"\d{4}\1\d{3}")),
        rf"\d{{4}}({_GAP})\d{{6}}\1\d{{4,5}}",
    )
]
_ISSUED = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{9,15}"  # Maestro
    r"|3[47]\d{13}"  # American Express
    r"|3(?:0[0-5]|09|[689]\d)\d{11}"  # Diners Club
    r"|35(?:2[89]|[3-8]\d)\d{12,15}"  # JCB
    r"|6(?:011|2\d\d|4[4-9]\d|5\d\d)\d{12,15}"  # Discover, UnionPay
    r"|(?:508\d|60\d\d)\d{12}"  # RuPay
    r"|220[0-4]\d{12,15}"  # Mir
)


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
        "card": any(is_card(match[0]) for printed in _PRINTED for match in printed.finditer(text)),
        "phone": any(map(str.isdigit, text)) and _has_phone(text, region),
    }
    return [kind for kind, is_there in found.items() if is_there]


def is_card(text: str) -> bool:
    """Say whether digits can be a card's number: of an issuer's beginning and length, with Luhn's check digit.

    Args:
        text: of one number, in groups of four (a last one may be shorter), of 4, 6 and 5 or 4 digits, or in one.

    >>> is_card("4111 1111 1111 1111"), is_card("4111 1111 1111 1112"), is_card("1996 1997 1998 1999")
    (True, False, False)
    """
    if not any(printed.fullmatch(text) for printed in _PRINTED):
        return False
    digits = re.sub(_GAP, "", text)
    return _ISSUED.fullmatch(digits) is not None and not _counts_up(text) and _has_check_digit(digits)


def _counts_up(text: str) -> bool:
    """Say whether groups of digits are steps of a scale: 4000 4500 5000 5500."""
    groups = [int(group) for group in re.split(_GAP, text)]
    steps = {second - first for first, second in itertools.pairwise(groups)}
    return len(steps) == 1 and steps != {0}


def _has_check_digit(digits: str) -> bool:
    numbers = map(int, reversed(digits))
    return sum(each if index % 2 == 0 else sum(divmod(2 * each, 10)) for index, each in enumerate(numbers)) % 10 == 0


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
