// The Batches page, as one React component without a build: Airflow gives React and the router as globals, and the component the place
// that it stands in (dagId, runId, taskId, mapIndex; none of them in the navigation).
(() => {
  "use strict";
  const React = globalThis.React;
  if (!React) {
    // Airflow 3.1.0 keeps its React to itself, and so may others. A text is what a component may give without one.
    globalThis.Batches = globalThis.AirflowPlugin = () =>
      "The Batches page cannot be shown here: this version of Airflow gives its plugins no React. Airflow 3.1.8 and later do. Until then, type " +
      "python -m airflow_provider_batchkit --help where Airflow is installed: the commands show the same, and more.";
    return;
  }
  const h = React.createElement;
  const { useCallback, useEffect, useRef, useState } = React;

  // where this file came from tells Airflow's base path, also below a path of a proxy
  const ROOT = new URL(import.meta.url).pathname.replace(/\/batchkit\/page\.js$/, "");
  const API = `${ROOT}/batchkit/api`;
  const FAST_MS = 5000;
  const SLOW_MS = 30000;
  // so long after its end a batch has landed, unless a task has failed
  const LANDS_WITHIN_S = 1800;

  // --- values for people ---

  const DASH = "–";
  const number = (value) => (value === null || value === undefined ? DASH : Number(value).toLocaleString("en-US"));

  /** Money comes as exact decimal text. What was spent is rounded to the nearest digit, as in a log's bill; a bound is rounded up. */
  function money(text, round = Math.round) {
    if (text === null || text === undefined) return "unknown";
    const value = Number(text);
    if (value === 0) return "$0.00";
    const digits = Math.abs(value) >= 1 ? 2 : Math.min(12, 3 - Math.floor(Math.log10(Math.abs(value))));
    const unit = 10 ** digits;
    return "$" + (round(value * unit - 1e-6) / unit).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  }

  const bound = (text) => money(text, Math.ceil);

  function span(seconds) {
    if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return DASH;
    const minutes = Math.floor(Math.max(seconds, 0) / 60);
    if (minutes === 0) return `${Math.max(Math.round(seconds), 0)} s`;
    const hours = Math.floor(minutes / 60);
    const days = Math.floor(hours / 24);
    if (days) return `${days} d ${hours % 24} h`;
    return hours ? `${hours} h ${minutes % 60} min` : `${minutes} min`;
  }

  const time = (iso) =>
    iso ? new Date(iso).toLocaleString("en-GB", { day: "2-digit", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" }) : DASH;
  const since = (iso, now) => (iso ? (now - Date.parse(iso)) / 1000 : null);
  const percent = (part, whole) => (whole ? Math.min(100, (100 * part) / whole) : 0);
  const taskName = (one) => (one.map_index >= 0 ? `${one.task_id} [${one.map_index}]` : one.task_id);
  const path = (...parts) => parts.map(encodeURIComponent).join("/");
  const runUrl = (one) => `${ROOT}/dags/${path(one.dag_id)}/runs/${path(one.run_id)}`;
  const taskUrl = (one) => `${runUrl(one)}/tasks/${path(one.task_id)}${one.map_index >= 0 ? `/mapped/${one.map_index}` : ""}`;

  const STATES = {
    doubt: ["in doubt", "warn"],
    sending: ["sending", "busy"],
    submitted: ["running", "busy"],
    ended: ["ended", "idle"],
    prepared: ["landing", "busy"],
    landed: ["landed", "good"],
    gone: ["gone", "bad"],
    rejected: ["rejected", "bad"],
    void: ["not accepted", "idle"],
    "nothing sent": ["nothing sent", "idle"],
  };

  // --- asking the server ---

  async function ask(address, options) {
    let answer;
    try {
      answer = await fetch(`${API}${address}`, { credentials: "same-origin", headers: { Accept: "application/json", "X-BatchKit": "page" }, ...options });
    } catch {
      throw { message: "Airflow's API server does not answer.", todo: "This page looks again by itself." };
    }
    let body = null;
    try {
      body = await answer.json();
    } catch {
      // not ours: the status says enough
    }
    if (answer.ok) return body;
    const detail = body && body.detail;
    if (detail && typeof detail === "object" && detail.message) throw { status: answer.status, ...detail };
    if (answer.status === 401) throw { status: 401, message: "You are not logged in any more.", todo: "Reload the page and log in." };
    if (answer.status === 403) throw { status: 403, message: "You may not see or do this.", todo: "Ask for access to the DAG." };
    throw { status: answer.status, message: `The server answered ${answer.status}.`, todo: "The log of Airflow's API server says why." };
  }

  const query = (values) => {
    const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "" && value !== false);
    return given.length ? `?${new URLSearchParams(given.map(([name, value]) => [name, String(value)]))}` : "";
  };

  /** What an address answers, asked again every so often while the tab is seen; null addresses are not asked. With `keep`, the answer of
   * the address before stays, marked as stale, until the new one's is there. */
  function useAnswer(address, everyMs, keep) {
    const [found, setFound] = useState({ address: null, data: null, error: null, at: 0 });
    const [turn, setTurn] = useState(0);
    useEffect(() => {
      if (address === null) return undefined;
      let over = false;
      let timer = 0;
      const look = async () => {
        if (!document.hidden) {
          try {
            const data = await ask(address);
            if (!over) setFound({ address, data, error: null, at: Date.now() });
          } catch (error) {
            if (!over) setFound((old) => ({ address, data: old.address === address ? old.data : null, error, at: Date.now() }));
          }
        }
        if (!over) timer = setTimeout(look, everyMs);
      };
      const seen = () => {
        if (!document.hidden) {
          clearTimeout(timer);
          look();
        }
      };
      document.addEventListener("visibilitychange", seen);
      look();
      return () => {
        over = true;
        clearTimeout(timer);
        document.removeEventListener("visibilitychange", seen);
      };
    }, [address, everyMs, turn]);
    const again = useCallback(() => setTurn((old) => old + 1), []);
    const current = found.address === address ? found : { data: keep ? found.data : null, error: null, at: 0, stale: true };
    return { ...current, again };
  }

  function useNow() {
    const [now, setNow] = useState(Date.now());
    useEffect(() => {
      const timer = setInterval(() => setNow(Date.now()), 1000);
      return () => clearInterval(timer);
    }, []);
    return now;
  }

  // --- small parts ---

  const cell = (label, content, kind) => h("td", { "data-label": label, className: kind || undefined }, content);
  const head = (...names) => h("thead", null, h("tr", null, names.map(([name, kind]) => h("th", { key: name, className: kind, scope: "col" }, name))));
  const Badge = ({ state }) => {
    const [text, kind] = STATES[state] || [state, "idle"];
    return h("span", { className: `bk-badge bk-${kind}` }, text);
  };
  const Bar = ({ part, whole, kind, label }) =>
    h(
      "span",
      { className: "bk-bar", role: "progressbar", "aria-valuenow": Math.round(percent(part, whole)), "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": label },
      h("span", { className: `bk-fill ${kind || ""}`, style: { width: `${percent(part, whole)}%` } }),
    );
  const Link = ({ to, children, away }) =>
    h("a", { href: to, className: "bk-link", ...(away ? { target: "_blank", rel: "noopener noreferrer" } : {}) }, children);
  const Note = ({ kind, title, children }) =>
    h("div", { className: `bk-note bk-${kind || "idle"}`, role: kind === "bad" ? "alert" : "status" }, h("strong", null, title), children ? h("div", null, children) : null);
  const Trouble = ({ error }) => h(Note, { kind: "bad", title: error.message }, error.todo);
  const Troubles = ({ list }) => (list || []).map((one) => h(Note, { key: one.ledger, kind: one.kind === "empty" ? "idle" : "bad", title: one.message }, one.todo));
  const Loading = () => h("div", { className: "bk-loading", role: "status" }, "Loading …");
  const Card = ({ title, value, hint }) =>
    h("div", { className: "bk-card" }, h("div", { className: "bk-card-title" }, title), h("div", { className: "bk-card-value" }, value), hint ? h("div", { className: "bk-hint" }, hint) : null);
  const Cards = ({ children }) => h("div", { className: "bk-cards" }, children);
  const Table = ({ children, label }) => h("div", { className: "bk-scroll" }, h("table", { className: "bk-table", "aria-label": label }, children));

  function NoLedger() {
    return h(
      Note,
      { title: "This page does not know yet where your ledger is." },
      "Batches are noted in a ledger: tables beside your results. Name the connection of your tasks (their sql_conn_id) in Airflow's configuration and restart the API server:",
      h("pre", { className: "bk-code" }, "[batchkit]\npage_ledger_conn_ids = warehouse"),
      "or AIRFLOW__BATCHKIT__PAGE_LEDGER_CONN_IDS=warehouse in its environment. Several are separated by commas.",
    );
  }

  function Who({ one, place, open }) {
    return h(
      "div",
      null,
      h("button", { className: "bk-name", onClick: () => open(one) }, place.taskId ? `job ${one.job_id.slice(0, 8)}` : `${place.dagId ? "" : `${one.dag_id} · `}${taskName(one)}`),
      h("div", { className: "bk-hint" }, h(Link, { to: runUrl(one) }, one.run_id)),
    );
  }

  /** Whether the API has ended everything of a job that it had: since when, or null. */
  function endedAt(batches, seen) {
    const looks = batches.map((batch) => seen[batch.batch_id]);
    return looks.length && looks.every((look) => look && look.status === "ended" && look.ended_at) ? looks.map((look) => look.ended_at).sort().pop() : null;
  }

  /** What a person ought to do about a job in flight; null where it goes its way. */
  function concern(state, batches, seen, expiresAt, now) {
    if (state === "doubt") return "Nobody saw whether the API accepted a batch. The task settles that by proof when it is tried again, and its log says what it waits for. Open the job for the command that decides it by hand.";
    const sending = batches.filter((batch) => batch.state === "sending" && since(batch.intended_at, now) > LANDS_WITHIN_S);
    if (sending.length) return `A batch has been on its way for ${span(since(sending[0].intended_at, now))}: its task has died or hangs. Look at the task; its next try finds out what became of the batch.`;
    const ended = endedAt(batches, seen);
    if (ended && since(ended, now) > LANDS_WITHIN_S) return `Everything ended ${span(since(ended, now))} ago and has not landed. Look in the run for a sensor or a fetch that failed or was not started, and clear it: that costs nothing.`;
    if (!ended && expiresAt && since(expiresAt, now) > 0) return "The 24 hours of a batch are over, and it has not landed. Look in the run for a sensor or a fetch that failed or was not started, and clear it: what was answered is still there.";
    return null;
  }

  // --- in flight ---

  function InFlight({ place, open, ledgers }) {
    const where = query({ dag_id: place.dagId, run_id: place.runId, task_id: place.taskId, map_index: place.mapIndex });
    const jobs = useAnswer(`/in-flight${where}`, FAST_MS);
    const progress = useAnswer(jobs.data && jobs.data.jobs.length ? "/progress" : null, FAST_MS);
    const now = useNow();
    if (!jobs.data) return jobs.error ? h(Trouble, { error: jobs.error }) : h(Loading);
    const seen = (progress.data && progress.data.batches) || {};
    const list = jobs.data.jobs;
    const requests = list.reduce((sum, one) => sum + one.open_requests, 0);
    const bounds = list.map((one) => one.open_bound_usd);
    const worries = list.map((one) => concern(one.state, one.open, seen, one.expires_at, now));
    const atMost = bounds.includes(null) ? null : String(bounds.reduce((sum, one) => sum + Number(one), 0));
    return h(
      React.Fragment,
      null,
      jobs.error ? h(Trouble, { error: jobs.error }) : null,
      h(Troubles, { list: jobs.data.troubles }),
      Object.entries((progress.data && progress.data.troubles) || {}).map(([conn, why]) =>
        h(Note, { key: conn, kind: "warn", title: `The API cannot be asked through the connection ${conn}: ${why}` }, "How far its batches are is not known now. They run on. Check the connection under Admin → Connections."),
      ),
      list.length === 0
        ? jobs.data.troubles.length === 0 ? h(Note, { title: "Nothing is in flight." }, "A job shows here from its first request until its last batch has landed. What has landed is under History.") : null
        : h(
            React.Fragment,
            null,
            h(
              Cards,
              null,
              h(Card, { title: "Jobs in flight", value: number(list.length), hint: jobs.data.more ? "the oldest; there are more" : null }),
              h(Card, { title: "Need a look", value: number(worries.filter(Boolean).length) }),
              h(Card, { title: "Requests", value: number(requests) }),
              h(Card, { title: "Can cost at most", value: atMost === null ? "not bounded" : bound(atMost) }),
            ),
            h(
              Table,
              { label: "Jobs in flight" },
              head(["Job"], ["State"], ["Model"], ["Requests done", "bk-wide"], ["Age"], ["Time left"], ["Expected", "bk-num"], ["At most", "bk-num"], ["Budget"]),
              h("tbody", null, list.map((one, index) => h(OpenJob, { key: one.ledger + one.job_id, one, seen, place, open, now, worry: worries[index] }))),
            ),
          ),
      place.dagId || !ledgers.length
        ? null
        : h("p", { className: "bk-hint" }, "Only what a ledger knows is here. Batches of the workspace that belong to none: ", h("code", { className: "bk-wrap" }, `python -m airflow_provider_batchkit orphans --conn-id ${ledgers.join(",")}`)),
    );
  }

  function OpenJob({ one, seen, place, open, now, worry }) {
    const known = one.open.filter((batch) => seen[batch.batch_id]);
    const done = known.reduce((sum, batch) => sum + seen[batch.batch_id].done, 0);
    const ended = known.filter((batch) => seen[batch.batch_id].status === "ended").length;
    const canceling = known.some((batch) => seen[batch.batch_id].status === "canceling");
    const left = one.expires_at ? (Date.parse(one.expires_at) - now) / 1000 : null;
    const late = left !== null && left < 3600;
    const over = endedAt(one.open, seen) !== null;
    const line = h(
      "tr",
      null,
      cell("Job", h(Who, { one, place, open })),
      cell("State", h("span", null, h(Badge, { state: over && one.state === "submitted" ? "ended" : one.state }), canceling ? h("span", { className: "bk-hint" }, " being canceled") : null)),
      cell("Model", one.models.length ? h("span", null, one.models.join(", "), one.models_of_this_job ? null : h("span", { className: "bk-hint" }, " (as in earlier runs)")) : DASH),
      cell(
        "Requests done",
        h(
          "div",
          null,
          h(Bar, { part: done, whole: one.open_requests, label: "requests done" }),
          h("div", { className: "bk-hint" }, known.length ? `${number(done)} of ${number(one.open_requests)} · ${ended} of ${one.open.length} batches ended` : `${number(one.open_requests)} requests in ${one.open.length} ${one.open.length === 1 ? "batch" : "batches"}`),
        ),
        "bk-wide",
      ),
      cell("Age", span(since(one.oldest_at || one.began_at, now)), "bk-short"),
      cell("Time left", left === null || over ? DASH : h("span", { className: late ? "bk-late" : undefined }, left <= 0 ? "expired" : span(left)), "bk-short"),
      cell("Expected", one.expected_usd === null ? DASH : money(one.expected_usd), "bk-num"),
      cell("At most", one.open_bound_usd === null ? "not bounded" : bound(one.open_bound_usd), "bk-num"),
      cell("Budget", one.budgets.join(", ") || DASH),
    );
    return worry ? h(React.Fragment, null, line, h("tr", { className: "bk-worry" }, h("td", { colSpan: 9, "data-label": "To do" }, worry))) : line;
  }

  // --- history ---

  function History({ place, open, about, ledger }) {
    const [filter, setFilter] = useState({});
    const [pages, setPages] = useState([null]);
    const set = (name) => (event) => {
      const value = event.target.type === "checkbox" ? event.target.checked : event.target.value;
      setFilter((old) => ({ ...old, [name]: value }));
      setPages([null]);
    };
    useEffect(() => setPages([null]), [ledger]);
    const before = pages[pages.length - 1];
    const where = query({ dag_id: place.dagId, run_id: place.runId, task_id: place.taskId, map_index: place.mapIndex, ...filter, ledger, before });
    const jobs = useAnswer(`/jobs${where}`, SLOW_MS, true);
    const choose = (name, label, values) =>
      h("label", { className: "bk-field" }, label, h("select", { value: filter[name] || "", onChange: set(name) }, h("option", { value: "" }, "all"), values.map((value) => h("option", { key: value, value }, (STATES[value] || [value])[0]))));
    return h(
      React.Fragment,
      null,
      h(
        "div",
        { className: "bk-filters" },
        place.dagId ? null : choose("dag_id", "DAG", about.dag_ids),
        choose("model", "Model", about.models),
        choose("state", "State", about.states),
        h("label", { className: "bk-field" }, "Day (UTC)", h("input", { type: "date", value: filter.day || "", onChange: set("day") })),
        h("label", { className: "bk-check" }, h("input", { type: "checkbox", checked: Boolean(filter.failed), onChange: set("failed") }), "failed rows only"),
      ),
      jobs.error ? h(Trouble, { error: jobs.error }) : null,
      !jobs.data
        ? jobs.error ? null : h(Loading)
        : jobs.data.jobs.length === 0
          ? h(Note, { title: "No job fits." }, Object.values(filter).some(Boolean) ? "Change the filters above." : "A job is here as soon as its task has begun to submit.")
          : h(
              "div",
              { className: jobs.stale ? "bk-stale" : undefined, "aria-busy": Boolean(jobs.stale) },
              h(
                Table,
                { label: "History" },
                head(["Job"], ["State"], ["Began"], ["Model"], ["Requests", "bk-num"], ["Failed", "bk-num"], ["Rounds", "bk-num"], ["Cost", "bk-num"], ["Saved", "bk-num"]),
                h(
                  "tbody",
                  null,
                  jobs.data.jobs.map((one) =>
                    h(
                      "tr",
                      { key: one.job_id },
                      cell("Job", h(Who, { one, place, open })),
                      cell("State", h(Badge, { state: one.state })),
                      cell("Began", time(one.began_at)),
                      cell("Model", one.models.join(", ") || DASH),
                      cell("Requests", number(one.requests), "bk-num"),
                      cell("Failed", one.failed ? h("span", { className: one.failed > one.unfinished ? "bk-late" : undefined }, number(one.failed)) : "0", "bk-num"),
                      cell("Rounds", number(one.rounds), "bk-num"),
                      cell("Cost", one.batches.landed ? money(one.batch_cost_usd) : DASH, "bk-num"),
                      cell("Saved", one.batches.landed ? money(one.savings_usd) : DASH, "bk-num"),
                    ),
                  ),
                ),
              ),
              h(
                "div",
                { className: "bk-pages" },
                h("button", { className: "bk-button", disabled: pages.length === 1, onClick: () => setPages((old) => old.slice(0, -1)) }, "← newer"),
                h("span", { className: "bk-hint" }, `page ${pages.length}`),
                h("button", { className: "bk-button", disabled: !jobs.data.next, onClick: () => setPages((old) => [...old, jobs.data.next]) }, "older →"),
              ),
            ),
    );
  }

  // --- one job ---

  /** A task instance has one job, which is shown at once; or none, as a sensor or a fetch. */
  function OfTask({ place, ledgers }) {
    const [turn, setTurn] = useState(0);
    const ledger = ledgers[turn];
    const where = query({ ledger, dag_id: place.dagId, run_id: place.runId, task_id: place.taskId, map_index: place.mapIndex === undefined ? -1 : place.mapIndex, limit: 1 });
    const found = useAnswer(`/jobs${where}`, SLOW_MS);
    const none = found.data && found.data.jobs.length === 0;
    useEffect(() => {
      if ((none || found.error) && turn + 1 < ledgers.length) setTurn(turn + 1);
    }, [none, found.error, turn]);
    if (!found.data) return found.error ? h(Trouble, { error: found.error }) : h(Loading);
    if (none) return h(Note, { title: "This task has asked nothing so far." }, "A sensor or a fetch has no batches of its own: those of the whole run are in the Batches tab of ", h(Link, { to: runUrl({ dag_id: place.dagId, run_id: place.runId }) }, "the run"), ".");
    return h(Job, { chosen: { ...found.data.jobs[0], ledger }, close: null });
  }

  function Job({ chosen, close }) {
    const job = useAnswer(`/dags/${path(chosen.dag_id)}/jobs/${path(chosen.job_id)}${query({ ledger: chosen.ledger })}`, FAST_MS);
    const one = job.data;
    const open = one && one.batch_list.some((batch) => ["submitted", "sending", "doubt", "prepared"].includes(batch.state));
    const progress = useAnswer(open ? "/progress" : null, FAST_MS);
    const [asking, setAsking] = useState(null);
    const now = useNow();
    const back = close ? h("button", { className: "bk-button", onClick: close }, "← back") : null;
    if (!one) return h(React.Fragment, null, back, job.error ? h(Trouble, { error: job.error }) : h(Loading));
    const seen = (progress.data && progress.data.batches) || {};
    const live = one.batch_list.filter((batch) => ["submitted", "sending", "doubt", "prepared"].includes(batch.state));
    const born = live.map((batch) => batch.created_at).filter(Boolean).sort()[0];
    const worry = concern(one.state, live, seen, born ? new Date(Date.parse(born) + 24 * 3600 * 1000).toISOString() : null, now);
    const over = endedAt(live, seen) !== null && one.state === "submitted";
    const bills = Object.entries(one.bills);
    const tokens = bills.reduce((sum, [, bill]) => [sum[0] + bill.input_tokens + bill.cache_write_5m_tokens + bill.cache_write_1h_tokens + bill.cache_read_tokens, sum[1] + bill.output_tokens], [0, 0]);
    return h(
      React.Fragment,
      null,
      h("div", { className: "bk-title" }, back, h("h2", null, `${one.dag_id} · ${taskName(one)}`), h(Badge, { state: over ? "ended" : one.state })),
      h(
        "div",
        { className: "bk-hint bk-where" },
        h(Link, { to: runUrl(one) }, `run ${one.run_id}`),
        h(Link, { to: taskUrl(one) }, "the task and its log"),
        one.batch_list.some((batch) => batch.console_url) ? h(Link, { to: one.batch_list.find((batch) => batch.console_url).console_url, away: true }, "Claude Console") : null,
        h("span", null, `job ${one.job_id}`),
        h("span", null, `ledger ${one.ledger}`),
        one.budgets.length ? h("span", null, `budget ${one.budgets.join(", ")}`) : null,
      ),
      job.error ? h(Trouble, { error: job.error }) : null,
      worry ? h(Note, { kind: "warn", title: "This job needs a look." }, worry) : null,
      h(
        Cards,
        null,
        h(Card, { title: "Requests", value: number(one.requests), hint: `${one.rounds || 0} ${one.rounds === 1 ? "round" : "rounds"}${one.unchanged_rows ? `, ${number(one.unchanged_rows)} rows unchanged` : ""}` }),
        h(Card, { title: "Cost", value: one.batches.landed ? money(one.batch_cost_usd) : DASH, hint: one.batches.landed ? `saved ${money(one.savings_usd)} of ${money(one.standard_cost_usd)}` : one.open_bound_usd === null ? "not bounded" : `at most ${bound(one.open_bound_usd)}` }),
        h(Card, { title: "Tokens", value: bills.length ? number(tokens[0] + tokens[1]) : DASH, hint: bills.length ? `${number(tokens[0])} in, ${number(tokens[1])} out` : null }),
        h(Card, { title: "Without a whole answer", value: number(one.failed), hint: one.unfinished ? `${number(one.unfinished)} of them unfinished` : null }),
      ),
      one.failures.length ? h(Failures, { one }) : null,
      h("h3", null, "Batches"),
      h(
        Table,
        { label: "Batches" },
        head(["Batch"], ["State"], ["Round", "bk-num"], ["Requests", "bk-wide"], ["Timeline"], ["Cost", "bk-num"], [""]),
        h("tbody", null, one.batch_list.map((batch) => h(BatchRow, { key: batch.shard, batch, ledger: one.ledger, look: seen[batch.batch_id], now, ask: () => setAsking(batch) }))),
      ),
      bills.length
        ? h(
            React.Fragment,
            null,
            h("h3", null, "Models"),
            h(
              Table,
              { label: "Models" },
              head(["Model"], ["Requests", "bk-num"], ["Input", "bk-num"], ["Cache writes", "bk-num"], ["Cache reads", "bk-num"], ["Output", "bk-num"], ["Cost", "bk-num"], ["Saved", "bk-num"]),
              h(
                "tbody",
                null,
                bills.map(([model, bill]) =>
                  h(
                    "tr",
                    { key: model },
                    cell("Model", model),
                    cell("Requests", number(bill.requests), "bk-num"),
                    cell("Input", number(bill.input_tokens), "bk-num"),
                    cell("Cache writes", number(bill.cache_write_5m_tokens + bill.cache_write_1h_tokens), "bk-num"),
                    cell("Cache reads", number(bill.cache_read_tokens), "bk-num"),
                    cell("Output", number(bill.output_tokens), "bk-num"),
                    cell("Cost", money(bill.batch_cost_usd), "bk-num"),
                    cell("Saved", money(bill.savings_usd), "bk-num"),
                  ),
                ),
              ),
            ),
          )
        : null,
      one.tables.length ? h("p", { className: "bk-hint" }, `Landed in ${one.tables.map((table) => `${table.table} (${number(table.rows)} rows)`).join(", ")}.`) : null,
      asking ? h(Cancel, { job: one, batch: asking, look: seen[asking.batch_id], close: () => setAsking(null), again: () => { job.again(); progress.again(); } }) : null,
    );
  }

  function BatchRow({ batch, ledger, look, now, ask: cancel }) {
    const running = batch.state === "submitted" && (!look || look.status === "in_progress");
    const steps = [
      ["rendered", batch.intended_at],
      ["submitted", batch.submitted_at],
      ["ended", batch.ended_at || (look && look.ended_at)],
      ["landed", batch.landed_at],
    ].filter(([, at]) => at);
    const counts = batch.counts ? Object.entries(batch.counts).filter(([, rows]) => rows).map(([name, rows]) => `${number(rows)} ${name.replace("_", " ")}`).join(", ") : null;
    return h(
      "tr",
      null,
      cell("Batch", h("div", null, batch.batch_id ? h("code", null, batch.batch_id) : "no id yet", batch.note ? h("div", { className: "bk-hint" }, batch.note) : null, batch.settle ? h("div", { className: "bk-hint" }, "Its task settles it by proof. To decide it yourself: ", h("code", { className: "bk-wrap" }, batch.settle.replaceAll("`", "").replaceAll(" CONN ", ` ${ledger} `).replace(/ \(CONN is .*\)$/, ""))) : null)),
      cell("State", h("span", null, h(Badge, { state: look && look.status === "ended" && batch.state === "submitted" ? "ended" : batch.state }), look && look.status === "canceling" && batch.state === "submitted" ? h("span", { className: "bk-hint" }, " canceling") : null)),
      cell("Round", number(batch.round), "bk-num"),
      cell("Requests", look ? h("div", null, h(Bar, { part: look.done, whole: look.total, label: "requests done" }), h("div", { className: "bk-hint" }, `${number(look.done)} of ${number(look.total)}`)) : h("div", null, number(batch.requests), counts ? h("div", { className: "bk-hint" }, counts) : null), "bk-wide"),
      cell("Timeline", h("ol", { className: "bk-steps" }, steps.map(([name, at], place) => h("li", { key: name, title: at }, h("b", null, name), " ", time(at), place ? h("span", { className: "bk-hint" }, ` +${span((Date.parse(at) - Date.parse(steps[place - 1][1])) / 1000)}`) : null)), running ? h("li", { className: "bk-hint" }, `running for ${span(since(batch.created_at, now))}`) : null)),
      cell("Cost", batch.cost_usd !== null ? money(batch.cost_usd) : batch.bound_usd !== null ? h("span", { className: "bk-hint" }, `at most ${bound(batch.bound_usd)}`) : DASH, "bk-num"),
      cell("", running && batch.batch_id ? h("button", { className: "bk-button bk-danger", onClick: cancel }, "Cancel …") : null, "bk-num"),
    );
  }

  /** Keys of rows that failed for one reason: some, and on demand all of them, a page at a time. */
  function Keys({ one, row }) {
    const [all, setAll] = useState({ keys: row.keys, next: null, begun: false, busy: false, error: null });
    const rest = row.rows - all.keys.length;
    const more = async () => {
      setAll((old) => ({ ...old, busy: true, error: null }));
      try {
        const found = await ask(`/dags/${path(one.dag_id)}/jobs/${path(one.job_id)}/failed${query({ ledger: one.ledger, like: row.keys[0], after: all.next })}`);
        setAll((old) => ({ keys: old.begun ? [...old.keys, ...found.keys] : found.keys, next: found.next, begun: true, busy: false, error: null }));
      } catch (error) {
        setAll((old) => ({ ...old, busy: false, error }));
      }
    };
    return h(
      "div",
      { className: "bk-keys" },
      all.keys.map((key) => h("code", { key }, key)),
      rest > 0 && (!all.begun || all.next) ? h("button", { className: "bk-more", onClick: more, disabled: all.busy }, all.busy ? "…" : `show ${number(rest)} more`) : null,
      all.error ? h("span", { className: "bk-hint", role: "alert" }, `${all.error.message} ${all.error.todo || ""}`) : null,
    );
  }

  function Failures({ one }) {
    return h(
      React.Fragment,
      null,
      h("h3", null, "Rows without a whole answer"),
      h(
        Table,
        { label: "Failures" },
        head(["Rows", "bk-num"], ["What happened"], ["Keys"], ["What helps"]),
        h(
          "tbody",
          null,
          one.failures.map((row, place) =>
            h(
              "tr",
              { key: [row.status, row.error_type, row.message || place].join("/") },
              cell("Rows", number(row.rows), "bk-num"),
              cell("What happened", h("div", null, h("b", null, [row.status.replace("_", " "), row.error_type].filter(Boolean).join(" · ")), row.message ? h("div", { className: "bk-words" }, row.message) : row.message_hidden ? h("div", { className: "bk-hint" }, "The words may quote an answer; [batchkit] show_content shows them.") : null)),
              cell("Keys", h(Keys, { one, row })),
              cell("What helps", row.advice),
            ),
          ),
        ),
      ),
      one.failures_not_shown ? h("p", { className: "bk-hint" }, `${number(one.failures_not_shown)} more rows failed with other messages.`) : null,
      h("p", { className: "bk-hint" }, "All of them: ", h("code", { className: "bk-wrap" }, `python -m airflow_provider_batchkit failed ${one.job_id} --rows --conn-id ${one.ledger}`)),
    );
  }

  function Cancel({ job, batch, look, close, again }) {
    const [state, setState] = useState({ busy: false, error: null });
    const first = useRef(null);
    useEffect(() => {
      if (first.current) first.current.focus();
      const leave = (event) => event.key === "Escape" && close();
      document.addEventListener("keydown", leave);
      return () => document.removeEventListener("keydown", leave);
    }, []);
    const carryOut = async () => {
      setState({ busy: true, error: null });
      try {
        await ask(`/dags/${path(job.dag_id)}/batches/${path(batch.batch_id)}/cancel${query({ ledger: job.ledger })}`, { method: "POST" });
        again();
        close();
      } catch (error) {
        setState({ busy: false, error });
      }
    };
    return h(
      "div",
      { className: "bk-veil", onClick: (event) => event.target === event.currentTarget && close() },
      h(
        "div",
        { className: "bk-dialog", role: "dialog", "aria-modal": true, "aria-labelledby": "bk-cancel-title" },
        h("h3", { id: "bk-cancel-title" }, "Cancel this batch?"),
        h("p", null, h("code", { className: "bk-wrap" }, batch.batch_id)),
        h("p", null, look ? `${number(look.done)} of its ${number(look.total)} requests are done. ` : `It has ${number(batch.requests)} requests. `, "What it has answered by then stays answered, is billed and lands. The other rows land as canceled; a further round of the task, or a task with only_failed_of, asks them again."),
        h("p", { className: "bk-hint" }, "This is noted in Airflow's audit log under your name."),
        state.error ? h(Trouble, { error: state.error }) : null,
        h("div", { className: "bk-actions" }, h("button", { className: "bk-button", ref: first, onClick: close, disabled: state.busy }, "Let it run"), h("button", { className: "bk-button bk-danger bk-solid", onClick: carryOut, disabled: state.busy }, state.busy ? "Canceling …" : "Cancel the batch")),
      ),
    );
  }

  // --- spend ---

  /** The present month and the twelve before it, in UTC, as the server takes them and as people read them. */
  function months() {
    const today = new Date();
    return Array.from({ length: 13 }, (_, back) => {
      const first = new Date(Date.UTC(today.getUTCFullYear(), today.getUTCMonth() - back, 1));
      return [first.toISOString().slice(0, 7), first.toLocaleString("en-GB", { month: "long", year: "numeric", timeZone: "UTC" })];
    });
  }

  function Spend({ place, ledger }) {
    const [by, setBy] = useState("day");
    const [over, setOver] = useState("30");
    const answer = useAnswer(`/spend${query({ ledger, by, [over.includes("-") ? "month" : "days"]: over, dag_id: place.dagId })}`, SLOW_MS, true);
    const data = answer.data;
    const spent = data ? data.spent : [];
    const total = (name) => (spent.some((one) => one[name] === null) ? null : String(spent.reduce((sum, one) => sum + Number(one[name]), 0)));
    const most = Math.max(...spent.map((one) => Number(one.batch_cost_usd || 0)), 0);
    const pick = (value, set, label, options) => h("label", { className: "bk-field" }, label, h("select", { value, onChange: (event) => set(event.target.value) }, options.map(([key, text]) => h("option", { key, value: key }, text))));
    return h(
      React.Fragment,
      null,
      h("div", { className: "bk-filters" }, pick(by, setBy, "Summed up by", [["day", "day (UTC)"], ["dag", "DAG"], ["model", "model"]]), pick(over, setOver, "Over", [["7", "7 days"], ["30", "30 days"], ["90", "90 days"], ["366", "a year"], ...months()])),
      answer.error ? h(Trouble, { error: answer.error }) : null,
      !data
        ? answer.error ? null : h(Loading)
        : h(
            "div",
            { className: answer.stale ? "bk-stale" : undefined, "aria-busy": Boolean(answer.stale) },
            h(Cards, null, h(Card, { title: "Spent", value: money(total("batch_cost_usd")), hint: `batches created ${data.until ? `from ${data.since} to ${data.until}` : `since ${data.since}`} (UTC)` }), h(Card, { title: "Saved", value: money(total("savings_usd")), hint: `of ${money(total("standard_cost_usd"))} at standard price` }), h(Card, { title: "Requests", value: number(spent.reduce((sum, one) => sum + one.requests, 0)) })),
            spent.length === 0
              ? h(Note, { title: "Nothing has landed in this time." }, "What a batch costs is known when it lands. Choose another time above.")
              : h(
                  Table,
                  { label: "Spending" },
                  head([by === "dag" ? "DAG" : by === "day" ? "Day" : "Model"], ["", "bk-wide"], ["Cost", "bk-num"], ["Saved", "bk-num"], ["Requests", "bk-num"], ["Tokens in", "bk-num"], ["Tokens out", "bk-num"]),
                  h(
                    "tbody",
                    null,
                    spent.map((one) =>
                      h(
                        "tr",
                        { key: one.name },
                        cell(by === "dag" ? "DAG" : by === "day" ? "Day" : "Model", one.name),
                        cell("", h(Bar, { part: Number(one.batch_cost_usd || 0), whole: most, label: `share of the largest` }), "bk-wide bk-bars"),
                        cell("Cost", money(one.batch_cost_usd), "bk-num"),
                        cell("Saved", money(one.savings_usd), "bk-num"),
                        cell("Requests", h("span", null, number(one.requests), one.unpriced_requests ? h("span", { className: "bk-hint" }, ` (${number(one.unpriced_requests)} without a known price)`) : null), "bk-num"),
                        cell("Tokens in", number(one.input_tokens), "bk-num"),
                        cell("Tokens out", number(one.output_tokens), "bk-num"),
                      ),
                    ),
                  ),
                ),
            h("h3", null, "Budgets"),
            data.budgets.length === 0 ? h("p", { className: "bk-hint" }, `No task${place.dagId ? " of this DAG" : ""} names a budget. ` + "budget={\"name\": …, \"usd\": …} on a submit caps what tasks may spend together.") : h("div", { className: "bk-budgets" }, data.budgets.map((one) => h(Budget, { key: one.name, one }))),
            data.latency.length ? h(Latency, { list: data.latency }) : null,
          ),
    );
  }

  function Budget({ one }) {
    const usd = one.cap_usd !== null;
    const cap = Number(usd ? one.cap_usd : one.cap_tokens);
    const spent = Number(usd ? one.spent_usd : one.spent_tokens);
    const reserved = Number(usd ? one.reserved_usd : one.reserved_tokens);
    const text = (value) => (usd ? money(String(value)) : `${number(value)} tokens`);
    const share = Math.floor(percent(spent + reserved, cap));
    const close = share >= 80;
    return h(
      "div",
      { className: "bk-budget" },
      h("div", { className: "bk-budget-head" }, h("span", null, h("b", null, one.name), " ", h("span", { className: close ? "bk-late" : "bk-hint" }, `${share} % used${close ? ", close to its cap" : ""}`)), h("span", { className: "bk-hint" }, `${text(usd ? one.cap_usd : one.cap_tokens)} ${one.window === "ever" ? "for good" : `a ${one.window}`}`)),
      h("span", { className: "bk-bar bk-thick", role: "img", "aria-label": `${share} % of the budget is spent or reserved` }, h("span", { className: `bk-fill ${close ? "bk-hot" : ""}`, style: { width: `${percent(spent, cap)}%` } }), h("span", { className: "bk-fill bk-reserved", style: { width: `${Math.min(percent(reserved, cap), 100 - percent(spent, cap))}%` } })),
      h("div", { className: "bk-hint" }, `spent ${text(spent)}, reserved ${text(reserved)}, left ${text(usd ? one.remaining_usd : one.remaining_tokens)}`, one.ends_at ? `; ends ${time(one.ends_at)}` : ""),
      one.alerts.length ? h("div", { className: "bk-hint" }, `Alerts: ${one.alerts.map((alert) => `${alert.percent} at ${time(alert.told_at)}`).join(", ")}`) : null,
    );
  }

  function Latency({ list }) {
    const most = Math.max(...list.map((one) => one.max_s), 1);
    return h(
      React.Fragment,
      null,
      h("h3", null, "From creation to end"),
      h(
        Table,
        { label: "Latency" },
        head(["Day"], ["DAG"], ["Batches", "bk-num"], ["", "bk-wide"], ["Half within", "bk-num"], ["95 % within", "bk-num"], ["Longest", "bk-num"]),
        h("tbody", null, list.slice(0, 60).map((one) => h("tr", { key: one.day + one.dag_id }, cell("Day", one.day), cell("DAG", one.dag_id), cell("Batches", number(one.batches), "bk-num"), cell("", h(Bar, { part: one.p95_s, whole: most, label: "95 percent within" }), "bk-wide bk-bars"), cell("Half within", span(one.p50_s), "bk-num"), cell("95 % within", span(one.p95_s), "bk-num"), cell("Longest", span(one.max_s), "bk-num")))),
      ),
    );
  }

  // --- the page ---

  const VIEWS = [["flight", "In flight"], ["history", "History"], ["spend", "Spend"]];
  // what was spent is summed up by DAG
  const viewsOf = (place) => (place.runId ? VIEWS.slice(0, 2) : VIEWS);

  /** What is shown stands behind the address's #, so that a reload and the browser's back button find it again. */
  function useHash() {
    const read = () => Object.fromEntries(new URLSearchParams(globalThis.location.hash.slice(1)));
    const [hash, setHash] = useState(read);
    useEffect(() => {
      const changed = () => setHash(read());
      globalThis.addEventListener("popstate", changed);
      globalThis.addEventListener("hashchange", changed);
      return () => {
        globalThis.removeEventListener("popstate", changed);
        globalThis.removeEventListener("hashchange", changed);
      };
    }, []);
    const go = useCallback((values) => {
      globalThis.history.pushState(globalThis.history.state, "", `#${new URLSearchParams(values)}`);
      setHash(read());
    }, []);
    return [hash, go];
  }

  function Batches({ dagId, runId, taskId, mapIndex }) {
    const place = { dagId, runId, taskId, mapIndex: mapIndex === undefined || mapIndex === null || Number(mapIndex) < 0 ? undefined : mapIndex };
    const about = useAnswer("/about", SLOW_MS);
    const [hash, go] = useHash();
    const [picked, setPicked] = useState(null);
    useEffect(style, []);
    const view = viewsOf(place).some(([name]) => name === hash.view) ? hash.view : runId ? "history" : "flight";
    let content;
    if (!about.data) content = about.error ? h(Trouble, { error: about.error }) : h(Loading);
    else if (about.data.ledgers.length === 0) content = h(NoLedger);
    else if (taskId) {
      const readable = about.data.ledgers.filter((name) => !about.data.troubles.some((one) => one.ledger === name));
      content = h(React.Fragment, null, h(Troubles, { list: about.data.troubles }), readable.length ? h(OfTask, { key: readable.join(), place, ledgers: readable }) : null);
    }
    else {
      const readable = about.data.ledgers.filter((name) => !about.data.troubles.some((one) => one.ledger === name));
      const ledger = readable.includes(picked) ? picked : readable[0] || about.data.ledgers[0];
      const open = (one) => go({ view, job: one.job_id, dag: one.dag_id, ledger: one.ledger });
      content = hash.job
        ? h(Job, { key: hash.job, chosen: { job_id: hash.job, dag_id: hash.dag || "", ledger: hash.ledger || ledger }, close: () => go({ view }) })
        : h(
            React.Fragment,
            null,
            h(
              "div",
              { className: "bk-top" },
              h("div", { className: "bk-tabs", role: "tablist" }, viewsOf(place).map(([name, title]) => h("button", { key: name, role: "tab", "aria-selected": view === name, className: view === name ? "bk-tab bk-on" : "bk-tab", onClick: () => go({ view: name }) }, title))),
              readable.length > 1 && view !== "flight" ? h("label", { className: "bk-field bk-ledger" }, "Ledger", h("select", { value: ledger, onChange: (event) => setPicked(event.target.value) }, readable.map((name) => h("option", { key: name, value: name }, name)))) : null,
            ),
            view !== "flight" ? h(Troubles, { list: about.data.troubles }) : null,
            view === "flight" ? h(InFlight, { place, open, ledgers: about.data.ledgers }) : readable.length === 0 ? null : view === "history" ? h(History, { place, open, about: about.data, ledger }) : h(Spend, { place, ledger }),
          );
    }
    return h("div", { className: "bk-root" }, h("div", { className: "bk" }, dagId ? null : h("h1", null, "Batches"), content));
  }

  const CSS = `
.bk { --ink: var(--chakra-colors-fg, CanvasText); --ground: var(--chakra-colors-bg, Canvas);
  --line: color-mix(in srgb, var(--ink) 16%, transparent); --soft: color-mix(in srgb, var(--ink) 4%, transparent); --mild: var(--chakra-colors-fg-muted, #71717a); --accent: #2563eb; --good: #15803d; --warn: #b45309; --bad: #b91c1c;
  color: var(--ink); padding: 16px; font-size: 14px; line-height: 1.45; max-width: 1500px; margin: 0 auto; width: 100%; box-sizing: border-box; overflow-wrap: anywhere; }
.dark .bk { --accent: #60a5fa; --good: #4ade80; --warn: #fbbf24; --bad: #f87171; }
.bk *, .bk *::before { box-sizing: border-box; }
.bk h1 { font-size: 24px; font-weight: 700; margin: 0 0 12px; } .bk h2 { font-size: 19px; font-weight: 700; margin: 0; } .bk h3 { font-size: 16px; font-weight: 700; margin: 24px 0 8px; }
.bk p { margin: 8px 0; } .bk code { font-family: ui-monospace, monospace; font-size: 12px; } .bk b, .bk strong { font-weight: 600; }
.bk-top { display: flex; flex-wrap: wrap; gap: 12px; justify-content: space-between; align-items: end; border-bottom: 1px solid var(--line); margin-bottom: 16px; }
.bk-tabs { display: flex; gap: 4px; } .bk-tab { padding: 8px 14px; border: 0; background: none; color: var(--mild); cursor: pointer; border-bottom: 2px solid transparent; margin-bottom: -1px; font-weight: 500; }
.bk-tab.bk-on { color: var(--ink); border-color: var(--accent); } .bk-ledger { margin-bottom: 8px; }
.bk button:focus-visible, .bk select:focus-visible, .bk input:focus-visible, .bk a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.bk-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 12px 0 16px; }
.bk-card, .bk-budget { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; background: var(--soft); }
.bk-card-title { color: var(--mild); font-size: 12px; } .bk-card-value { font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.bk-scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; } .bk-table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.bk-table th { text-align: left; font-size: 12px; font-weight: 600; color: var(--mild); padding: 8px 12px; background: var(--soft); white-space: nowrap; }
.bk-table td { padding: 10px 12px; border-top: 1px solid var(--line); vertical-align: top; } .bk-table .bk-num { text-align: right; white-space: nowrap; } .bk-short { white-space: nowrap; } .bk-wide { min-width: 150px; } .bk-bars { vertical-align: middle; }
.bk-name { border: 0; background: none; padding: 0; color: var(--accent); font-weight: 600; cursor: pointer; text-align: left; } .bk-name:hover, .bk-link:hover { text-decoration: underline; }
.bk-hint { color: var(--mild); font-size: 12px; } .bk-link { color: inherit; text-decoration: underline; text-decoration-color: var(--line); text-underline-offset: 3px; } .bk-where { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0; }
.bk-badge { display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 12px; font-weight: 600; border: 1px solid currentColor; white-space: nowrap; justify-self: start; }
.bk-badge.bk-busy { color: var(--accent); } .bk-badge.bk-good { color: var(--good); } .bk-badge.bk-warn, .bk-late { color: var(--warn); } .bk-badge.bk-bad { color: var(--bad); } .bk-badge.bk-idle { color: var(--mild); } .bk-late { font-weight: 600; }
.bk-bar { display: flex; height: 6px; border-radius: 99px; background: var(--line); overflow: hidden; margin: 6px 0 4px; } .bk-thick { height: 10px; } .bk-fill { background: var(--accent); min-width: 0; transition: width .4s; } .bk-reserved { opacity: .45; } .bk-hot { background: var(--warn); }
.bk-note { border: 1px solid var(--line); border-left: 4px solid var(--mild); border-radius: 6px; padding: 12px 14px; margin: 12px 0; background: var(--soft); } .bk-note.bk-bad { border-left-color: var(--bad); } .bk-note.bk-warn { border-left-color: var(--warn); }
.bk-code { background: var(--ground); border: 1px solid var(--line); border-radius: 6px; padding: 8px 10px; margin: 8px 0; font-size: 12px; white-space: pre-wrap; font-family: ui-monospace, monospace; } .bk-wrap { white-space: pre-wrap; }
.bk-table .bk-worry td { border-top: 0; padding-top: 0; color: var(--warn); } .bk-more { border: 0; background: none; padding: 0; color: var(--accent); font-size: 12px; cursor: pointer; } .bk-more:hover { text-decoration: underline; }
.bk-stale { opacity: .55; } .bk-loading { padding: 32px; text-align: center; color: var(--mild); }
.bk-filters { display: flex; flex-wrap: wrap; gap: 12px; align-items: end; margin-bottom: 12px; } .bk-field { display: flex; flex-direction: column; gap: 2px; font-size: 12px; color: var(--mild); } .bk-check { display: flex; gap: 6px; align-items: center; padding: 7px 0; }
.bk-field select, .bk-field input { color: var(--ink); background: var(--ground); border: 1px solid var(--line); border-radius: 6px; padding: 0 8px; height: 34px; font-size: 14px; max-width: 240px; color-scheme: light; } .dark .bk-field select, .dark .bk-field input { color-scheme: dark; }
.bk-button { border: 1px solid var(--line); background: var(--ground); color: var(--ink); border-radius: 6px; padding: 5px 12px; cursor: pointer; white-space: nowrap; justify-self: start; } .bk-button:disabled { opacity: .45; cursor: default; } .bk-danger { color: var(--bad); border-color: currentColor; } .bk-solid { background: #b91c1c; color: #fff; border-color: #b91c1c; }
.bk-pages { display: flex; gap: 12px; align-items: center; justify-content: center; margin: 12px 0; } .bk-title { display: flex; flex-wrap: wrap; gap: 12px; align-items: center; }
.bk-steps { list-style: none; padding: 0; margin: 0; font-size: 12px; } .bk-words { white-space: pre-wrap; } .bk-keys { display: flex; flex-wrap: wrap; gap: 2px 8px; align-items: baseline; } .bk-budgets { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 12px; } .bk-budget-head { display: flex; justify-content: space-between; gap: 8px; flex-wrap: wrap; }
.bk-veil { position: fixed; inset: 0; background: rgba(0,0,0,.5); display: flex; align-items: center; justify-content: center; padding: 16px; z-index: 1500; } .bk-dialog { background: var(--ground); border: 1px solid var(--line); border-radius: 10px; padding: 20px; max-width: 480px; width: 100%; } .bk-dialog h3 { margin-top: 0; } .bk-actions { display: flex; gap: 10px; justify-content: flex-end; flex-wrap: wrap; margin-top: 16px; }
.bk-root { container-type: inline-size; width: 100%; }
@container (max-width: 640px) { .bk { padding: 10px; } .bk-table thead { display: none; } .bk-table, .bk-table tbody, .bk-table tr, .bk-table td { display: block; width: 100%; } .bk-table tr { padding: 8px 0; border-top: 1px solid var(--line); } .bk-table tr:first-child, .bk-table .bk-worry { border-top: 0; } .bk-table .bk-worry td { padding: 0 12px 3px; }
  .bk-table td, .bk-table .bk-num { border: 0; padding: 3px 12px; text-align: left; white-space: normal; display: grid; grid-template-columns: 104px minmax(0, 1fr); gap: 8px; } .bk-table td::before { content: attr(data-label); color: var(--mild); font-size: 12px; padding-top: 1px; } .bk-table td:empty { display: none; } .bk-cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; } .bk-card-value { font-size: 17px; } }
`;

  function style() {
    if (document.getElementById("bk-style")) return;
    const element = document.createElement("style");
    element.id = "bk-style";
    element.textContent = CSS;
    document.head.append(element);
  }

  globalThis.Batches = Batches;
  globalThis.AirflowPlugin = Batches;
})();
