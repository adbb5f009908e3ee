# SPDX-License-Identifier: Apache-2.0
"""Closed lists of English words, for `phrases.py`: what a caption's words are when they do not name a thing."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words("a an the his her their its my your our this these those each every another some any")
OBJECT_PRONOUNS = _words("him them it me us himself herself itself themselves")
SUBJECT_PRONOUNS = _words("he she they it who which i we you")
MODALS = _words("can could will would shall should may might must does do did don't doesn't didn't cannot can't")
NEGATIONS = _words("no without not never neither nor")
BETWEEN_NEGATION_AND_THING = DETERMINERS | _words("other visible real single more longer")
DIRECTIONS = _words("at away toward towards")
"""What follows a verb rather than a thing."""
MANNER = _words("up down out back off around together happily quickly slowly quietly")
FUNCTION_WORDS = _words(
    "and or but nor as at by for from in into inside of off on onto out outside over under through to toward towards "
    "up down with within without near beside behind below above between beneath along across around against among "
    "during before after then that which who whose where when while is are was were be been being has have had "
    "its than"
)

COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white grey gray beige gold golden silver turquoise "
    "teal cyan magenta maroon navy tan khaki cream"
)
ALSO_COLOURS = _words(
    "orange gold silver rose peach olive cream lime chocolate plum salmon violet lavender coral turquoise mint amber "
    "ruby emerald copper bronze ivory mustard lilac"
)
"""Things whose name is a colour as well."""
BEFORE_A_COLOUR = _words("is are bright dark light pale deep in painted coloured colored")

# Tags that no box belongs to: what people do, what the image is, and where in it something is.
ACTIONS = _words(
    "sit stand walk run jump eat drink ride hold carry wear look lie lay lean sleep swim climb throw hit kneel "
    "crouch smile laugh talk speak read write cook clean sing dance pose stare gaze reach pull push open close sell "
    "buy give take put pour feed pet hug kiss chase follow graze perch hang float fly stroll gather listen wait"
)
IMAGE_WORDS = _words(
    "image images photo photos photograph photographs scene scenes view views shot shots background foreground "
    "closeup close-up caption screenshot snapshot"
)
PLACE_WORDS = _words("front back side sides top bottom left right center middle corner corners edge edges")

PEOPLE = _words(
    "man men woman women boy boys girl girls person persons people child children kid kids baby babies toddler "
    "toddlers lady ladies guy guys couple family crowd team player players worker workers student students teacher "
    "teachers skier skiers surfer surfers rider riders skater skaters snowboarder snowboarders skateboarder "
    "skateboarders cyclist cyclists runner runners swimmer swimmers driver drivers officer officers soldier soldiers "
    "policeman policemen chef chefs farmer farmers waiter waiters waitress waitresses dancer dancers singer singers "
    "musician musicians athlete athletes batter catcher pitcher referee bride groom mother father tourist tourists "
    "pedestrian pedestrians passenger passengers customer customers fan fans"
)
"""Who does something: `man watches` is a verb, `pocket watches` is not."""
PLURAL_PEOPLE = frozenset(word for word in PEOPLE if word.endswith("s") and f"{word[:-1]}" in PEOPLE) | _words(
    "men women people children babies ladies policemen"
)
FOR_ONE = _words("a an one another each every")
FOR_MANY = _words("few dozen hundred thousand couple lot many great two three four five six seven eight nine ten of")
PLURAL_BEFORE_A_THING = _words("sports clothes goods arms savings")
"""Plurals that say what kind a thing is: `sports car`."""

AFTER_A_THING = _words(
    "next close atop amid amidst alongside beyond underneath upon past throughout until since because so if although "
    "though whereas plus like such also only just still now again here there too both all not alone together ahead "
    "apart away back out off asleep awake visible full made worn seen shown held set kept lit taken ready high tall "
    "sat stood ran lay held wore flew came went saw took gave sang swam ate drank slept rode drove left began one two "
    "three four five that which"
)
"""Words that may follow a thing, beside `FUNCTION_WORDS` and those in -ing, -ed, -ly and -s."""
NOT_AFTER_A_THING = _words(
    "bed beds shed sheds sled seed seeds weed weeds feed breed family belly jelly fly lily bus gas lens canvas cactus"
)
"""Things that end as a verb or adverb may."""

THINGS_IN_ING = _words(
    "building painting ring swing ceiling wing string king railing clothing lighting earring wedding awning spring "
    "sling pudding topping dressing icing stocking drawing carving crossing landing covering flooring"
)

ABBREVIATIONS = _words("tv tvs suv suvs atm atms dvd dvds cd cds pc pcs usb led lcd bbq gps")
"""Things that are written in capitals."""

COMPOUNDS = _words(
    "hot-dog corn-dog prairie-dog guinea-pig sea-lion mountain-lion teddy-bear rocking-horse couch-potato french-horn "
    "night-club golf-club dog-house bird-house boat-house car-park bus-stop bus-station train-station fire-truck "
    "fire-hydrant fire-place traffic-light street-light stop-sign table-tennis ice-cream peanut-butter punching-bag "
    "bean-bag magnifying-glass ski-lift head-light flash-light pony-tail cat-walk cross-walk side-walk tail-light "
    "tree-house water-bottle baby-carriage horse-chestnut butter-fly sea-horse key-board home-plate bear-market"
)
"""Compounds that are not what their last word, or not what their first word, says; also where no tag has them."""

OTHER_IN_PLURAL = _words("glasses spectacles irons woods waters customs goods pants shorts arms scales boxers tights")
"""Plurals that mean something else than several of the singular, unless `of` follows: `glasses of wine`."""
