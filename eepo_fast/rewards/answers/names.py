"""Names of units and of numbers in other languages."""

import re


def _table(rows: str) -> dict[str, str]:
    return {name: words[0] for row in rows.strip().splitlines() if (words := row.split()) for name in words[1:]}


# the English name, then what others call it; a word that is a unit of something else in English is not here
UNITS = _table("""
m meter metro metros mètre mètres metri м метр метра метров 米 公尺 メートル 미터
cm zentimeter centímetro centímetros centimètre centimètres centimetri см сантиметр сантиметра сантиметров 厘米 公分
mm millimètre millimètres milímetros мм 毫米
km kilometer kilómetro kilómetros kilomètre kilomètres chilometri quilômetros км километр километра километров 千米 公里
per pro par por
squared carré carrés cuadrado cuadrados quadrado quadrados quadrati quadrato
square квадратных квадратный квадратные квадратного кв
francs CHF
pounds GBP
kg kilogramm kilogrammes kilogramos chilogrammi кг килограмм килограмма килограммов 千克 公斤
g gramm gramme grammes gramos grammi г грамм грамма граммов 克
L litro litros litri л литр литра литров 升
s sekunde sekunden segundo segundos seconde secondes secondi с сек секунд секунды секунда 秒 초
min minuto minutos minuten minuti мин минут минуты минута 分钟 分鐘
hours stunde stunden std hora horas heure heures ore ч час часа часов 小时 小時 時間 시간
days tag tage tagen jour jours día días dias giorni дня дней 天
years jahr jahre jahren ans année années año años anos anni год года лет 年 岁
degrees grad degré degrés grado grados graus gradi градус градуса градусов 度
percent prozent pourcent procent процент процента процентов パーセント
euros EUR euro евро 欧元 유로
USD доллар доллара долларов dólar dólares 美元
rubles RUB rub rubel руб рубль рубля рублей
yuan CNY RMB 元 块 人民币
yen JPY 円 日元
thousand tausend mille mila тысяч тысячи тысяча тыс
million millionen millones millón milioni milhões milhão millions миллион миллиона миллионов млн
billion milliarde milliarden milliard milliards miliardi billions миллиард миллиарда миллиардов млрд
pieces stück stk szt шт штук штуки 个 個
""")
UNITS |= {
    "quadratmeter": "square m", "quadratzentimeter": "square cm", "平方米": "square m", "平方厘米": "square cm",
    "立方米": "cubic m", "立方厘米": "cubic cm",
    **dict.fromkeys(("por ciento", "por cento", "pour cent", "per cento"), "percent"),
}  # fmt: skip
NUMBER_WORDS = re.compile(
    r""
    r"(?:mi|bi|tri)l+(?:h(?:ão|ões|oes|ares?)|[oó]n(?:es)?|ar(?:es)?|iers?|iardo|iardi|"
    r"i[oó]n(?:en|es|i|e|er|y|ów)?|iard(?:en?|er|s|y)?|jon(?:er)?|joen(?:en)?|jard(?:en|er)?|y[oa]rd?)|"
    r"milj(?:on(?:er)?|oen(?:en)?|ard(?:en|er)?)|mil|mille|mila|(?:zehn|hundert|ein|zwei|drei)?tausend\w{0,4}|"
    r"(?:ein|zwei|drei)?hundert(?:e|en|stel)?|dutzend\w{0,2}|paar\w{0,2}|halb\w{0,2}|einhalb|anderthalb|hälften?|"
    r"(?:drit|vier|fünf|sechs|sieb|ach|neun|zehn|zwölf|zwanzigs)tel|mal|weniger|mehr|nicht|kein\w{0,2}|oder|"
    r"fakultät|quadrat|douzaines?|dizaines?|quinzaines?|vingtaines?|centaines?|milliers?|paires?|demi\w{0,2}|"
    r"moitiés?|tiers|\w{3,9}ièmes?|fois|moins|factorielle|carrés?|doce(?:na)s?|decenas?|centenas?|centenares?|"
    r"cientos?|cien|pares|mitad(?:es)?|medi[oa]s?|tercios?|cuartos?|quintos?|veces|menos|más|cuadrado|dúzias?|"
    r"duzias?|dezenas?|metades?|mei[oa]s?|terços?|vezes|dozzin[ae]|decin[ae]|centinai[oa]|migliai[oa]|mezz[oaie]|"
    r"metà|terz[io]|quart[oi]|coppi[ae]|pai[oa]|cento|volte|meno|più|тысяч\w{0,3}|тыс|миллион\w{0,3}|млн|"
    r"миллиард\w{0,3}|млрд|триллион\w{0,3}|сот(?:ен|ни|ня|ых)?|сто|десят(?:ок|ка|ков|ки|ых)|дюжин\w{0,2}|пар[аы]?|"
    r"половин\w{0,2}|полтор\w{1,3}|трет(?:ь|и|ей|ьих)|четверт(?:ь|и|ей|ых)|раза?|меньше|больше|не|нет|или|минус|"
    r"плюс|tysi[aąęe]c\w{0,2}|tuzin\w{0,2}|pół|duizend\w{0,2}|honderd\w{0,2}|dozijn\w{0,2}|helft|tusen|hundra|"
    r"dussin|yüz|bin|milyon|milyar|düzine|juta|ribu|ratus|lusin|nghìn|ngàn|triệu|tỷ|trăm|ألف|آلاف|مليون|مليار|مئة|"
    r"مائة"
)
NOT_NUMBERS = re.compile("千(?=[米克瓦卡焦赫帕伏吨])|成员|多边形|半径|半徑|双曲线")
NUMBER_CHARACTERS = re.compile(
    "^(?:个|個)?[零〇一二三四五六七八九十百千两兩半双雙对対對倍余餘多几幾]|[万萬亿億兆或]|分之|^[的の]|以[上下内]|进制|[二三]乗|[打成割折半方]$|阶乘|ダース|"
    "^(?:십|백|천|만|억|조|반|배|쌍|다스)|हज|लाख|करोड|सौ|दर्जन|พัน|หมื่น|แสน|ล้าน|ร้อย|โหล"
)
# directly behind a number; further on they may count something else
COUNTS = frozenset(
    re.findall(
        r"\w+",
        "zwei drei vier fünf sechs sieben acht neun zehn elf zwölf zwanzig dreißig vierzig fünfzig sechzig siebzig "
        "achtzig neunzig deux trois quatre cinq sept huit neuf dix onze douze treize quinze seize vingt trente "
        "quarante cinquante soixante dos tres cuatro cinco siete ocho nueve diez once doce quince veinte treinta "
        "cuarenta cincuenta sesenta setenta ochenta noventa due quattro cinque sette otto nove dieci undici dodici "
        "venti trenta quaranta cinquanta два три четыре пять шесть семь восемь девять десять двадцать тридцать "
        "сорок пятьдесят ",
    )
)
