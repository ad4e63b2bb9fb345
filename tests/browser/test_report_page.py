"""The report in a real browser: Debian's chromium, driven by playwright."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from rankwise.ranks.plan import RankPlan
from rankwise.report.report import write_report
from tests.report import events, sample

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

CONTRAST = """
() => {
  const luminance = ([r, g, b]) => [r, g, b]
    .map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = numbers(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const hidden = !element.checkVisibility() || element.closest('.skip, title, desc');
    if (!own || hidden) continue;
    const svg = element instanceof SVGElement;
    const style = getComputedStyle(element);
    const box = element.closest('g.cell:not(.zero)')?.querySelector('rect');
    const back = box ? numbers(getComputedStyle(box).fill) : behind(element);
    found.push([ratio(numbers(svg ? style.fill : style.color), back), element.textContent.trim().slice(0, 40)]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


def t5_plan() -> RankPlan:
    """An encoder, a decoder and a head, with a layer of rank 0."""
    kinds = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.v", "layer.1.DenseReluDense.wi")
    names = [f"{stack}.block.{i}.{kind}" for stack in ("encoder", "decoder") for i in range(3) for kind in kinds]
    shapes = [sample.LayerShape(name, 64, 64) for name in [*names, "lm_head"]]
    return RankPlan.from_shapes(shapes, [0, *range(1, len(shapes))], r=20, lora_alpha=16, methods=("gora", "rora"))


PLANS = {
    "bert": sample.uneven_plan(sample.bert_shapes()),
    "llama": sample.uneven_plan(sample.llama_shapes(), model="Llama-3.1-8B"),
    "t5": t5_plan(),
}


SCHEDULED = {"sora": "llama", "ab-lora": "t5", "beamlora": "bert", "xgblora": "t5"}
"""Runs whose schedule acted, and the plan that each began with."""


@pytest.fixture(scope="module", params=[*PLANS, "failed", *SCHEDULED])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RankPlan, Path]:
    plan = PLANS[SCHEDULED.get(request.param, request.param if request.param in PLANS else "bert")]
    status = "failed" if request.param == "failed" else "finished"
    folder = sample.write_run(tmp_path_factory.mktemp(request.param), plan, status)
    if request.param in SCHEDULED:
        sample.write_lines(folder / "ranks.jsonl", events.SCHEDULES[request.param](plan))
    return plan, write_report(folder)


def opened(page: Page, path: Path) -> tuple[list[str], list[str]]:
    """Console messages and requests of loading the page."""
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri(), wait_until="load")
    return messages, requests


def test_the_page_loads_in_silence_and_asks_for_nothing_else(browser: Browser, report: tuple[RankPlan, Path]) -> None:
    page = browser.new_page()
    messages, requests = opened(page, report[1])
    page.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [report[1].as_uri()]


def test_every_layer_is_one_visible_cell_of_the_rank_heat_map(browser: Browser, report: tuple[RankPlan, Path]) -> None:
    plan, path = report
    page = browser.new_page()
    opened(page, path)
    cells = page.locator("#ranks g.cell")
    hints = page.locator("#ranks g.cell > title").all_text_contents()
    boxes = page.evaluate(
        """[...document.querySelectorAll('#ranks g.cell rect')]
        .map(r => r.getBoundingClientRect()).map(b => [b.width, b.height])"""
    )
    assert cells.count() == len(plan.layers)
    page.close()
    assert sorted(hint.split(":")[0] for hint in hints) == sorted(plan.ranks)
    assert min(min(box) for box in boxes) > 8


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_nothing_sticks_out_at_any_width(browser: Browser, report: tuple[RankPlan, Path], width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    opened(page, report[1])
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll('body *:not(.skip)')].filter(e => !e.closest('.scroll, svg'))
        .filter(e => e.getBoundingClientRect().right > width + 0.5).map(e => e.outerHTML.slice(0, 80))""",
        width,
    )
    page.close()
    assert outside == []


def test_texts_of_a_picture_do_not_leave_it(browser: Browser, report: tuple[RankPlan, Path]) -> None:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    opened(page, report[1])
    cut = page.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter(t => {
          const [b, s] = [t.getBoundingClientRect(), t.closest('svg').getBoundingClientRect()];
          return b.width > 0 && (b.left < s.left - 1 || b.right > s.right + 1 || b.bottom > s.bottom + 1);
        }).map(t => t.textContent)"""
    )
    page.close()
    assert cut == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser: Browser, report: tuple[RankPlan, Path], scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
    opened(page, report[1])
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = page.evaluate(CONTRAST)
    page.close()
    assert len(found) > 100
    assert [entry for entry in found if entry[0] < 4.5] == []


def test_the_page_follows_the_color_scheme(browser: Browser, report: tuple[RankPlan, Path]) -> None:
    backs = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
        opened(page, report[1])
        backs.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert backs[0] != backs[1]
