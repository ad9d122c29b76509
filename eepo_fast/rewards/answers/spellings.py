"""One LaTeX spelling for characters and for commands that mean the same."""

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∗": "\\cdot ",
    "÷": "/", "⁄": "/", "∕": "/", "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ",
    "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "∅": "\\emptyset ", "°": "^\\circ ", "º": "^\\circ ", "′": "'", "θ": "\\theta ", "α": "\\alpha ",
    "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "ω": "\\omega ", "φ": "\\phi ", "μ": "\\mu ", "σ": "\\sigma ",
    "τ": "\\tau ", "ρ": "\\rho ", "∠": "\\angle ", "△": "\\triangle ", "⟨": "\\langle ", "⟩": "\\rangle ",
    "ℝ": "\\mathbb{R}", "“": "", "”": "", "’": "'", **dict.fromkeys("€£¥￥₽₹₩₺₫฿₴₪₱", ""),
    "µ": "\\mu ", "\u03a9": "\\Omega ", "\u2126": "\\Omega ", "\u00c5": "\\AA ", "\u212b": "\\AA ", "⊙": "\\odot ",
    "✓": "", "。": ".", "∼": "\\approx ", "¢": "\\text{cents}", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ",
    "⌉": "\\rceil ", "∖": "\\setminus ", "‖": "\\|", "∥": "\\parallel ", "∣": "|", "∘": "\\circ ", "≡": "\\equiv ",
    "ℓ": "\\ell ", "ℏ": "\\hbar ", "ħ": "\\hbar ",
    "ℕ": "\\mathbb{N}", "ℤ": "\\mathbb{Z}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
}  # fmt: skip
COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "times": "cdot", "ast": "cdot", "leq": "le", "leqslant": "le",
    "geq": "ge", "geqslant": "ge", "neq": "ne", "lbrace": "{", "rbrace": "}", "mathrm": "text", "textrm": "text",
    "textbf": "text", "textit": "text", "textnormal": "text", "mbox": "text", "operatorname": "text", "mathbf": "text",
    "mathit": "text", "boldsymbol": "text", "mathsf": "text", "textsf": "text", "texttt": "text", "emph": "text",
    "bf": "", "rm": "", "left": "", "right": "", "displaystyle": "", "large": "", "Large": "", "small": "", "huge": "",
    "nicefrac": "frac", "sfrac": "frac", "dbinom": "binom", "tbinom": "binom", "bigcup": "cup", "backslash": "setminus",
    "textdegree": "^\\circ ",
    "textstyle": "", "limits": "", "quad": " ", "qquad": " ", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lbrack": "[", "rbrack": "]", "degree": "^\\circ ", "varnothing": "emptyset", "land": ",", "lor": ";", "tan": "tan",
    "thinspace": " ", "approxeq": "approx", "simeq": "approx", "sim": "approx", "doteq": "=", "colon": ":", "lt": "<",
    "gt": ">", "underline": "", "checkmark": "", "blacksquare": "", "square": "", "euro": "", "pounds": "",
    "dollar": "", "rightarrow": "to", "lg": "log_{10}", "Vert": "\\|", "lVert": "\\|", "rVert": "\\|",
    "widehat": "hat", "widetilde": "tilde", "overrightarrow": "vec", "top": "{T}", "intercal": "{T}",
    "smallsetminus": "setminus", "mathopen": "", "mathclose": "", "middle": "",
    **{size + side: "" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")},
}  # fmt: skip
