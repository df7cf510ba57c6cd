"""The sentences of the demo corpora: two small seeded grammars, English and Mandarin."""

import random
from dataclasses import dataclass

# A slot's words stand in one string; "_" joins the words of an entry that belong together.
ENGLISH_SLOTS = {
    "name": "alice bella carlos diana edward fiona george hannah julia kevin laura martin oscar robert sarah victor",
    "count": "two three four five six seven eight nine ten eleven twelve twenty forty",
    "hour": "one two three four five six seven eight nine ten eleven twelve",
    "minute": "five ten twenty forty",
    "colour": "red green blue yellow white black purple orange silver",
    "size": "small large heavy broken empty old new round",
    "things": "apples bottles boxes candles carrots cups flowers glasses knives lemons onions pencils plates shirts "
    "spoons towels",
    "thing": "basket blanket camera clock guitar hammer jacket kettle ladder letter mirror newspaper suitcase wallet",
    "room": "attic bathroom bedroom cellar garage garden kitchen library office",
    "place": "airport bakery beach bridge castle factory hospital hotel market museum school station village",
    "city": "athens berlin boston chicago dublin geneva lisbon london moscow oslo paris sydney tokyo vienna warsaw",
    "day": "monday tuesday wednesday thursday friday saturday sunday today tomorrow",
    "daypart": "morning afternoon evening night",
    "weather": "rain snow fog wind sunshine thunder",
    "food": "bread butter cheese chicken coffee honey milk pepper salad sugar",
    "device": "heater printer television dishwasher computer telephone",
    "switch": "on off up down",
    "get": "bring carry find hide move open sell paint",
    "did": "bought cleaned counted dropped forgot ordered repaired wanted",
    "go": "drives flies hurries returns travels walks",
    "vehicle": "bus train boat plane taxi",
    "near": "behind beside under above near",
}
ENGLISH_TEMPLATES = (
    "please {get} the {size} {thing}",
    "{get} {count} {colour} {things} from the {room}",
    "{name} {did} {count} {size} {things}",
    "{name} {did} the {colour} {thing} in the {room}",
    "turn the {device} {switch} in the {room}",
    "set a timer for {count} minutes",
    "the {vehicle} to {city} leaves at {hour} {minute}",
    "{name} {go} from {city} to {city} on {day}",
    "{name} and {name} meet {near} the {place}",
    "there will be {weather} in {city} {day} {daypart}",
    "add {food} and {food} to my list",
    "the {colour} {thing} is {near} the {thing}",
    "{name} {go} to the {place} every {daypart}",
    "how many {things} are in the {room}",
    "call {name} at {hour} {minute} on {day}",
    "put the {size} {thing} {near} the {device}",
    "{food} with {food} costs {count} dollars",
)

# Mandarin entries carry the numbered pinyin that the voice reads.
MANDARIN_SLOTS = {
    "who": "我:wo3 你:ni3 他:ta1 我们:wo3_men5 老师:lao3_shi1 医生:yi1_sheng1 妈妈:ma1_ma5 爸爸:ba4_ba5 "
    "朋友:peng2_you5 学生:xue2_sheng5 司机:si1_ji1 经理:jing1_li3",
    "time": "今天:jin1_tian1 明天:ming2_tian1 昨天:zuo2_tian1 早上:zao3_shang5 晚上:wan3_shang5 下午:xia4_wu3 "
    "星期一:xing1_qi1_yi1 星期五:xing1_qi1_wu3 春天:chun1_tian1 冬天:dong1_tian1",
    "city": "北京:bei3_jing1 上海:shang4_hai3 广州:guang3_zhou1 南京:nan2_jing1 西安:xi1_an1 武汉:wu3_han4 "
    "天津:tian1_jin1 成都:cheng2_du1 杭州:hang2_zhou1 青岛:qing1_dao3",
    "place": "学校:xue2_xiao4 医院:yi1_yuan4 公园:gong1_yuan2 商店:shang1_dian4 车站:che1_zhan4 机场:ji1_chang3 "
    "饭店:fan4_dian4 办公室:ban4_gong1_shi4 图书馆:tu2_shu1_guan3",
    "number": "两:liang3 三:san1 四:si4 五:wu3 六:liu4 七:qi1 八:ba1 九:jiu3 十:shi2",
    "things": "本书:ben3_shu1 个苹果:ge4_ping2_guo3 杯茶:bei1_cha2 张票:zhang1_piao4 件衣服:jian4_yi1_fu5 "
    "把椅子:ba3_yi3_zi5 瓶水:ping2_shui3 条鱼:tiao2_yu2 个面包:ge4_mian4_bao1",
    "colour": "红色:hong2_se4 绿色:lv4_se4 白色:bai2_se4 黑色:hei1_se4 黄色:huang2_se4 蓝色:lan2_se4",
    "thing": "手机:shou3_ji1 电脑:dian4_nao3 汽车:qi4_che1 桌子:zhuo1_zi5 雨伞:yu3_san3 帽子:mao4_zi5 钱包:qian2_bao1 "
    "杯子:bei1_zi5",
    "do": "买:mai3 卖:mai4 要:yao4 找:zhao3 送:song4 拿:na2",
    "weather": "下雨:xia4_yu3 下雪:xia4_xue3 刮风:gua1_feng1 很冷:hen3_leng3 很热:hen3_re4",
    "ride": "坐火车:zuo4_huo3_che1 坐飞机:zuo4_fei1_ji1 开车:kai1_che1 走路:zou3_lu4",
}
MANDARIN_TEMPLATES = (
    "{who} {time} {ride} 去:qu4 {city}",
    "{who} 想:xiang3 {do} {number} {things}",
    "{city} {time} 会:hui4 {weather}",
    "{who} 在:zai4 {place} {do} {colour} {thing}",
    "请:qing3 给:gei3 {who} {number} {things}",
    "{time} {who} 和:he2 {who} 去:qu4 {place}",
    "{who} 的:de5 {thing} 在:zai4 {place}",
    "{colour} {thing} 是:shi4 {who} 的:de5",
)


@dataclass(frozen=True)
class Sentence:
    """One sentence of a grammar."""

    text: str
    """The transcript: words separated by spaces."""
    spoken: str
    """What the synthesiser reads: the same English words, or numbered pinyin."""


def vocabulary(language: str) -> set[str]:
    """Return all words that sentences of ``language`` ("en" or "zh") can hold."""
    slots, templates = _grammar(language)
    entries = [e for words in slots.values() for e in words.split()]
    entries += [e for t in templates for e in t.split() if not e.startswith("{")]
    return {e.partition(":")[0].upper() for e in entries} | {_AND[language].text}


def _grammar(language: str) -> tuple[dict[str, str], tuple[str, ...]]:
    return (ENGLISH_SLOTS, ENGLISH_TEMPLATES) if language == "en" else (MANDARIN_SLOTS, MANDARIN_TEMPLATES)


def make_sentence(language: str, rng: random.Random) -> Sentence:
    """Draw one sentence; no slot is filled twice with the same words.

    Args:
        language: "en" or "zh".
        rng: the only source of randomness.
    """
    slots, templates = _grammar(language)
    used: set[str] = set()
    entries = []
    for part in rng.choice(templates).split():
        if part.startswith("{"):
            part = rng.choice([e for e in slots[part[1:-1]].split() if e not in used])
            used.add(part)
        entries.append(part)
    if language == "en":
        text = " ".join(entries)
        return Sentence(text.upper(), text)
    words, readings = zip(*(e.split(":") for e in entries), strict=True)
    return Sentence(" ".join(words), " ".join(r.replace("_", " ") for r in readings))


# What joins two sentences of one utterance.
_AND = {"en": Sentence("AND", "and"), "zh": Sentence("然后", "ran2 hou4")}


def make_sentences(language: str, count: int, seed: int, joined: float = 0.0) -> list[Sentence]:
    """Return ``count`` different sentences, the same for the same seed.

    Args:
        language: "en" or "zh".
        count: how many.
        seed: determines all of them.
        joined: share of those that are two sentences joined by a word.
    """
    rng = random.Random(f"{language}/{seed}")
    found: dict[str, Sentence] = {}
    while len(found) < count:
        sentence = make_sentence(language, rng)
        if rng.random() < joined:
            parts = (sentence, _AND[language], make_sentence(language, rng))
            sentence = Sentence(" ".join(p.text for p in parts), " ".join(p.spoken for p in parts))
        found.setdefault(sentence.text, sentence)
    return list(found.values())
