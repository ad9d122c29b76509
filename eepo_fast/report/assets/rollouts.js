// The rollout browser: a prompt and its group, stage 1 beside stage 2, every token coloured by what is asked for.
// An iteration's rollouts lie in a script of their own, loaded when it is chosen; it calls `rollouts` below.
"use strict";

const browser = (() => {
  const KEPT = 4; // iterations held in memory
  const ENTROPY_FULL = 2; // nats of the full colour
  const loaded = new Map(); // "run/step" -> groups
  const state = { run: 0, step: 0, group: 0, colour: "forget" };
  let shown = []; // groups of this iteration that pass the filter

  const COLOURS = {
    plain: ["Plain", "The completions as text."],
    entropy: ["Entropy", "How uncertain the policy was before each token."],
    gate: ["Gate", "Stage 1: tokens that the forget step was told to make less likely, where the policy was certain."],
    probability: ["Probability", "How likely the policy found the token: the paler, the likelier."],
    forget: ["Forget step", "Stage 1: what forgetting did to each token. Stage 2: how much likelier, or less likely, the " +
      "forgetful weights found what they then said than the policy does."],
  };

  // -- numbers

  // Thousandths as 16-bit integers in base64; null where there is none.
  function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / 2 }, (_, i) => {
      const value = view.getInt16(2 * i, true);
      return value === -32768 ? null : value / 1000;
    });
  }

  function numbersOf(row) {
    for (const name of ["logprob", "entropy", "change"]) {
      if (typeof row[name] === "string") row[name] = unpack(row[name]);
    }
    return row;
  }

  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = (values) => (values.length ? sum(values) / values.length : NaN);
  const signed = (value, digits = 2) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(digits);

  function factor(value) { // e^value, as "× 0.42"
    const times = Math.exp(value);
    return `× ${times >= 1000 || times < 0.001 ? times.toExponential(1) : times.toPrecision(2)}`;
  }

  // The change that gets the full colour: nearly the largest of the group, so that steps of any size can be seen.
  function changeScale(group) {
    const sizes = group.rows.flatMap((row) => row.change ?? []).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
    return Math.max(0.01, sizes[Math.floor(0.98 * (sizes.length - 1))] ?? 0);
  }

  function shade(row, i, scale) {
    if (state.colour === "entropy" && row.entropy) return `rgba(var(--entropy),${Math.min(1, row.entropy[i] / ENTROPY_FULL) * 0.75})`;
    if (state.colour === "gate" && row.gate) return row.gate[i] === "1" ? "rgba(var(--gate),0.35)" : "";
    if (state.colour === "probability" && row.logprob) return `rgba(var(--probability),${(1 - Math.exp(row.logprob[i])) * 0.75})`;
    if (state.colour === "forget" && row.change && row.change[i] !== null) {
      const name = row.change[i] < 0 ? "less" : "more";
      return `rgba(var(--${name}),${Math.min(1, Math.abs(row.change[i]) / scale) * 0.75})`;
    }
    return "";
  }

  // -- what is shown

  // A reward that is missing is neither right nor wrong; one between 0 and 1 is a part.
  const KINDS = { missing: "?", right: "●", part: "◐", wrong: "○" };
  const kindOf = (row) => (row.reward === null ? "missing" : row.reward >= 1 ? "right" : row.reward > 0 ? "part" : "wrong");
  const isRight = (row) => kindOf(row) === "right";
  const stageOf = (group, stage) => group.rows.filter((row) => row.stage === stage);
  const rewardsOf = (rows) => rows.map((row) => row.reward).filter((reward) => reward !== null);
  const allAre = (rows, kind) => rewardsOf(rows).length > 0 && rows.every((row) => ["missing", kind].includes(kindOf(row)));

  const FILTERS = {
    all: () => true,
    mixed: (g) => new Set(rewardsOf(g.rows)).size > 1,
    right: (g) => allAre(g.rows, "right"),
    wrong: (g) => allAre(g.rows, "wrong"),
    differ: (g) => Math.abs(mean(rewardsOf(stageOf(g, 1))) - mean(rewardsOf(stageOf(g, 2)))) > 1e-9,
  };

  function listGroups() {
    const all = loaded.get(keyOf(state)) ?? [];
    const text = byId("search").value.toLowerCase();
    const contains = (g) => !text || g.prompt.toLowerCase().includes(text) || g.rows.some((r) => r.text.toLowerCase().includes(text));
    shown = all.filter((g) => FILTERS[byId("filter").value](g) && contains(g));
    state.group = Math.max(0, Math.min(state.group, shown.length - 1));
    byId("groups").replaceChildren(...shown.map((group, i) => {
      const item = element("li");
      item.setAttribute("role", "option");
      item.id = `group-${i}`;
      const dots = element("div", undefined, "dots");
      for (const stage of [1, 2]) {
        const part = element("span", undefined, "stage");
        stageOf(group, stage).forEach((row) => part.append(element("span", KINDS[kindOf(row)], kindOf(row))));
        dots.append(part);
      }
      item.append(dots, element("div", group.problem.trim(), "prompt"));
      item.addEventListener("click", () => choose({ group: i }));
      return item;
    }));
    showGroup();
  }

  function showGroup() {
    [...byId("groups").children].forEach((item, i) => {
      item.setAttribute("aria-selected", i === state.group);
      if (i === state.group) {
        const list = byId("groups");
        const over = item.offsetTop - list.offsetTop - list.scrollTop;
        if (over < 0 || over > list.clientHeight - item.offsetHeight) list.scrollTop += over - list.clientHeight / 2;
      }
    });
    byId("groups").setAttribute("aria-activedescendant", `group-${state.group}`);
    byId("token").hidden = true;
    const place = byId("group");
    const group = shown[state.group];
    if (!group) {
      place.replaceChildren(element("p", "No group here is like that.", "note"));
      return;
    }
    group.rows.forEach(numbersOf);
    const scale = changeScale(group);
    const stages = element("div", undefined, "stages");
    for (const [stage, name] of [[1, "Stage 1, from the policy"], [2, "Stage 2, after forgetting"], [3, "AEPO's samples"]]) {
      const rows = stageOf(group, stage);
      if (rows.length) stages.append(column(rows, group, name, scale));
    }
    const prompt = element("div", group.prompt, "prompt-text");
    const about = element("p", `${group.id}${group.answer === null ? "" : `, answer ${group.answer}`}`, "note");
    place.replaceChildren(prompt, about, legend(scale), stages);
  }

  function column(rows, group, name, scale) {
    const box = element("div");
    const different = new Set(rows.map((r) => r.text)).size;
    const rewards = rewardsOf(rows);
    const lines = [`mean reward ${rewards.length ? mean(rewards).toFixed(2) : "unknown"}, ${different} different answers of ${rows.length}`];
    if (rewards.length < rows.length) lines.push(`${rows.length - rewards.length} without a reward`);
    if (rows[0].stage === 1 && rows.some((r) => r.change)) {
      const pairs = rows.filter((r) => r.gate).flatMap((r) => (r.change ?? []).map((c, i) => [r.gate[i] === "1", c])).filter(([, c]) => c !== null);
      const gated = pairs.filter(([open]) => open).map(([, c]) => c);
      const rest = pairs.filter(([open]) => !open).map(([, c]) => c);
      if (gated.length) lines.push(`log-prob of gated tokens ${signed(mean(gated), 3)}, of the others ${rest.length ? signed(mean(rest), 3) : "none"}`);
    }
    box.append(element("h3", name, "stage-head"), element("p", lines.join("; "), "note"));
    rows.forEach((row) => box.append(card(row, group, scale)));
    return box;
  }

  function card(row, group, scale) {
    const place = group.rows.indexOf(row);
    const same = group.rows.findIndex((r) => r.text === row.text);
    const box = element("article", undefined, "card");
    const head = element("header");
    head.append(element("b", `#${place + 1}`));
    head.append(element("span", row.reward === null ? `no reward: ${row.status}` : `reward ${Number(row.reward.toPrecision(4))}`, kindOf(row)));
    head.append(element("span", `advantage ${signed(row.advantage)}`), element("span", `${row.length} tokens`));
    if (row.reward !== null && row.status !== "ok") head.append(element("span", row.status));
    const marks = new Map(row.marks ?? []);
    marks.forEach((what, i) => head.append(element("span", `↪ ${what}, from token ${i + 1}`)));
    if (!row.finished) head.append(element("span", "cut off", "missing"));
    if (same < place) head.append(element("span", `same as #${same + 1}`));
    if (row.change && row.stage < 3) {
      const total = sum(row.change.filter((c) => c !== null));
      head.append(element("span", `${factor(total)} as likely ${row.stage === 1 ? "after forgetting" : "as for the policy"}`));
    }
    const text = element("div", row.tokens ? undefined : row.text, "tokens");
    if (row.tokens) { text.tabIndex = 0; text.setAttribute("aria-label", `completion ${place + 1}, token by token`); }
    (row.tokens ?? []).forEach((token, i) => {
      if (marks.has(i)) text.append(element("span", "↪", "mark"));
      const span = element("span");
      span.row = row;
      span.place = i;
      // a line break would hide its own colour
      token.split("\n").forEach((part, k) => { if (k) span.append(element("span", "⏎", "mark"), "\n"); span.append(part); });
      span.style.background = shade(row, i, scale);
      text.append(span);
    });
    box.append(head, text);
    return box;
  }

  function legend(scale) {
    const box = element("p", undefined, "note");
    const swatch = (css) => { const s = element("span", undefined, "swatch"); s.style.background = css; return s; };
    const ramp = (name) => swatch(`linear-gradient(to right, transparent, rgba(var(--${name}),0.75))`);
    if (state.colour === "entropy") box.append("0", ramp("entropy"), `${ENTROPY_FULL} nats and more`);
    if (state.colour === "gate") box.append(swatch("rgba(var(--gate),0.35)"), "open: entropy below α around this token");
    if (state.colour === "probability") box.append("certain", ramp("probability"), "unlikely");
    if (state.colour === "forget") {
      box.append(`−${scale.toFixed(2)} nats`, swatch("linear-gradient(to right, rgba(var(--less),0.75), transparent, rgba(var(--more),0.75))"),
        `+${scale.toFixed(2)} nats: less likely, more likely`);
    }
    return box;
  }

  function describe(span) {
    const { row, place: i } = span;
    const show = (name, value, digits = 3) => (value === undefined || value === null ? [] : [`${name} ${value.toFixed(digits)}`]);
    const lines = [JSON.stringify(row.tokens[i])];
    const logprob = row.logprob?.[i];
    if (logprob !== undefined && logprob !== null) lines.push(`probability ${Math.exp(logprob).toPrecision(3)} (log ${logprob.toFixed(3)})`);
    lines.push(...show("entropy", row.entropy?.[i]));
    if (row.gate) lines.push(`gate ${row.gate[i] === "1" ? "open" : "closed"}`);
    const change = row.change?.[i];
    if (change !== undefined && change !== null) lines.push(`${row.stage === 1 ? "forgetting" : "θ' against θ"} ${signed(change, 3)} nats, ${factor(change)}`);
    return lines.join("\n");
  }

  // -- choosing

  function load() {
    if (loaded.has(keyOf(state))) {
      listGroups();
      return;
    }
    byId("group").replaceChildren(element("p", "loading …", "note"));
    const file = `rollouts/${encodeURIComponent(DATA.runs[state.run].key)}/step_${String(state.step).padStart(6, "0")}.js`;
    const script = document.createElement("script");
    script.src = file;
    script.onerror = () => byId("group").replaceChildren(element("p", `${file} is not there; write the report again.`, "missing"));
    script.onload = () => script.remove();
    document.head.append(script);
  }

  const keyOf = ({ run, step }) => `${DATA.runs[run].key}/${step}`;

  function receive(key, step, groups) {
    loaded.set(`${key}/${step}`, groups);
    if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
    if (`${key}/${step}` === keyOf(state)) listGroups();
  }

  function choose(change) {
    const before = { ...state };
    Object.assign(state, change);
    const steps = DATA.runs[state.run].steps;
    if (state.run !== before.run) {
      fillSteps();
      if (!steps.includes(state.step)) state.step = steps[steps.length - 1];
    }
    byId("run").value = state.run;
    byId("step").value = state.step;
    history.replaceState(null, "", `#rollouts=${state.run},${state.step},${state.group},${state.colour}`);
    [...byId("colours").children].forEach((button) => button.setAttribute("aria-pressed", button.dataset.colour === state.colour));
    byId("explanation").textContent = DATA.runs[state.run].details ? COLOURS[state.colour][1]
      : "This run logged no numbers of single tokens: log.token_details=true gives the colours.";
    if (state.run !== before.run || state.step !== before.step || !loaded.has(keyOf(state))) load();
    else showGroup();
  }

  function fillSteps() {
    const { steps, rewards } = DATA.runs[state.run];
    byId("step").replaceChildren(...steps.map((step, i) => {
      const option = element("option", rewards[i] === null ? step : `${step} · reward ${rewards[i].toFixed(2)}`);
      option.value = step;
      return option;
    }));
  }

  function move(by) {
    const steps = DATA.runs[state.run].steps;
    const place = Math.max(0, Math.min(steps.length - 1, steps.indexOf(state.step) + by));
    choose({ step: steps[place] });
  }

  const nextGroup = () => choose({ group: Math.min(shown.length - 1, state.group + 1) });
  const lastGroup = () => choose({ group: Math.max(0, state.group - 1) });
  const KEYS = {
    ArrowLeft: () => move(-1), ArrowRight: () => move(1),
    j: nextGroup, k: lastGroup,
    ...Object.fromEntries(Object.keys(COLOURS).map((name, i) => [String(i + 1), () => choose({ colour: name })])),
  };

  function isVisible() {
    const { top, bottom } = byId("rollouts").getBoundingClientRect();
    return top < innerHeight * 0.7 && bottom > innerHeight * 0.2;
  }

  // Through a completion that has the focus, token by token.
  function walk(text, by) {
    const tokens = [...text.children];
    const here = tokens.findIndex((span) => span.classList.contains("here"));
    tokens[here]?.classList.remove("here");
    const span = tokens[Math.max(0, Math.min(tokens.length - 1, here + by))];
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest" });
    tell(span);
  }

  const pointAt = (event) => tell(event.target.closest?.("#group .tokens > span"));

  function tell(span) {
    const box = byId("token");
    box.hidden = !span;
    if (!span) return;
    box.textContent = describe(span);
    const { left, bottom, top } = span.getClientRects()[0] ?? span.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${bottom + box.offsetHeight + 10 < innerHeight ? bottom + 6 : top - box.offsetHeight - 6}px`;
  }

  function listen() {
    byId("run").addEventListener("change", (e) => choose({ run: Number(e.target.value) }));
    byId("step").addEventListener("change", (e) => choose({ step: Number(e.target.value) }));
    byId("earlier").addEventListener("click", () => move(-1));
    byId("later").addEventListener("click", () => move(1));
    byId("filter").addEventListener("change", listGroups);
    byId("search").addEventListener("input", listGroups);
    byId("group").addEventListener("mousemove", pointAt);
    byId("group").addEventListener("mouseleave", pointAt);
    byId("group").addEventListener("click", pointAt);
    document.addEventListener("scroll", () => { byId("token").hidden = true; }, { passive: true });
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !isVisible()) return;
      if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.target.matches?.(".tokens") && way) { event.preventDefault(); walk(event.target, way); return; }
      if (event.target.id === "groups" && ["ArrowDown", "ArrowUp"].includes(event.key)) {
        event.preventDefault();
        (event.key === "ArrowDown" ? nextGroup : lastGroup)();
        return;
      }
      if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
    });
  }

  // #rollouts=RUN,ITERATION,GROUP,COLOUR
  function fromAddress() {
    const [run, step, group, colour] = (location.hash.match(/^#rollouts=(.*)$/)?.[1] ?? "").split(",");
    const found = { run: 0, group: Number(group) || 0 };
    const wishes = [(r) => r.details && r.alpha !== null, (r) => r.details, () => true]; // EEPO with colours first
    found.run = run && DATA.runs[Number(run)]?.steps.length ? Number(run)
      : wishes.map((wish) => DATA.runs.findIndex((r) => r.steps.length && wish(r))).find((i) => i >= 0);
    const { steps } = DATA.runs[found.run];
    found.step = steps.includes(Number(step)) ? Number(step) : steps[steps.length - 1];
    found.colour = COLOURS[colour] ? colour : DATA.runs[found.run].details ? "forget" : "plain";
    return found;
  }

  function build() {
    if (!DATA.runs.some((run) => run.steps.length)) {
      byId("no-rollouts").hidden = false;
      return;
    }
    byId("browser").hidden = false;
    DATA.runs.forEach((run, i) => {
      if (!run.steps.length) return;
      const option = element("option", run.name);
      option.value = i;
      byId("run").append(option);
    });
    Object.entries(COLOURS).forEach(([name, [label]], i) => {
      const button = element("button", `${i + 1} ${label}`);
      button.dataset.colour = name;
      button.addEventListener("click", () => choose({ colour: name }));
      byId("colours").append(button);
    });
    const start = fromAddress();
    listen();
    state.run = start.run;
    fillSteps();
    const linked = location.hash.startsWith("#rollouts=");
    let started = false;
    const begin = () => { if (!started) { started = true; choose(start); } };
    // the first iteration is loaded when somebody comes near, not with the page
    new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) begin(); }, { rootMargin: "600px" }).observe(byId("rollouts"));
    if (!linked) return;
    begin();
    addEventListener("load", () => byId("rollouts").scrollIntoView()); // once what is above has its height
  }

  return { build, receive };
})();

function rollouts(key, step, groups) { browser.receive(key, step, groups); }

browser.build();
