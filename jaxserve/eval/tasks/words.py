"""Words that generated tasks are made of: common English, one to three tokens each in most tokenizers."""

from __future__ import annotations

NAMES = """Anna Paul Lucy Tom Clara Ben Mary Jack Emma Sam Rosa Peter Nina Oscar Ella Hugo Fiona Adam Julia Max Laura
Felix Alice David Grace Henry Sarah Leo Martha Simon Ruth Victor Helen Oliver Jane Frank Kate George Eva Daniel Sophie
Martin Irene Philip Maya Robert Lily Arthur Diana Edward Nora Walter Iris Thomas Vera Albert Olga Charles Molly
James""".split()
CITIES = """Paris London Rome Berlin Madrid Oslo Vienna Athens Dublin Cairo Lima Tokyo Boston Delhi Prague Moscow Lisbon
Warsaw Milan Venice Geneva Naples Havana Chicago Sydney Toronto Nairobi Dallas Denver Seattle""".split()
PLACES = """kitchen garden cellar attic barn church school market library office bedroom hall tower forest mill station
harbour castle shop park bath stable yard bakery museum theatre bank hotel cave field""".split()
OBJECTS = """key lamp box book ring clock cup knife hat coat bag ball chair table mirror candle bottle basket letter
coin drum bell rope shoe pillow brush spoon plate map pen flute kite doll wheel ladder bucket blanket sword crown
watch""".split()
COLOURS = "red blue green yellow black white brown grey pink purple orange golden silver".split()
FOODS = """bread milk cheese apples soup rice fish cake honey eggs butter tea coffee plums grapes nuts pears beans corn
salad pasta lemons carrots onions berries sugar meat jam figs dates""".split()
ANIMALS = (
    "fox dog cat horse cow bear wolf lion mouse bird duck goose pig goat sheep rabbit owl frog deer donkey".split()
)
