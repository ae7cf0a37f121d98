"""What a person without a mouse meets on a page: where Tab leads, what shows it, and what keys do there.

Only Tab, Shift+Tab, Enter, Space, arrows and Escape are pressed.
"""

from __future__ import annotations

from typing import Any

from chromium import settled

REMEMBER = """
// Every element that something listens to for a click, and every click that happens, however it came about.
window.listening = [];
window.clicked = 0;
const add = EventTarget.prototype.addEventListener;
EventTarget.prototype.addEventListener = function (kind, ...rest) {
    if (['click', 'dblclick', 'mousedown', 'pointerdown'].includes(kind) && this instanceof Element) {
        window.listening.push(this);
    }
    return add.call(this, kind, ...rest);
};
add.call(window, 'click', () => { window.clicked += 1; }, true);
"""
"""Runs before a page's own scripts."""
_KNOWN = """
    const clickable =
        'a[href], button, select, input, textarea, summary, [onclick], [role=button], [role=tab], [role=option]';
    const shown = (e) => e.checkVisibility({visibilityProperty: true}) && e.getClientRects().length > 0;
    const outline = (e) => {
        const style = getComputedStyle(e);
        return [style.outlineStyle, style.outlineWidth, style.outlineColor, style.boxShadow].join(' ');
    };
    const name = (e) => {
        window.numbers ??= new Map();
        if (!window.numbers.has(e)) window.numbers.set(e, window.numbers.size);
        const says = (e.getAttribute('aria-label') ?? e.textContent).trim().replace(/\\s+/g, ' ').slice(0, 40);
        return `${window.numbers.get(e)} ${e.tagName.toLowerCase()} ${e.id} ${says}`;
    };
    // A wheel or a drag over what scrolls does what arrows must be able to do.
    const scrolls = (e) => {
        const style = getComputedStyle(e);
        const one = (over, inner, outer) => ['auto', 'scroll'].includes(over) && inner > outer + 1;
        const over = one(style.overflowX, e.scrollWidth, e.clientWidth);
        return over || one(style.overflowY, e.scrollHeight, e.clientHeight);
    };
    const inside = (e) => e.querySelector(`${clickable}, [tabindex="0"]`) !== null;
    const moving = () => [...document.querySelectorAll('main *')].filter((e) => shown(e) && scrolls(e) && !inside(e));
"""
_WANTED = f"""() => {{ {_KNOWN}
    // Vega listens to every kind of event on a chart, for the words beside the pointer; a click does nothing there.
    const listening = window.listening.filter((e) => e.isConnected && !e.closest('.chart'));
    const all = [...document.querySelectorAll(clickable), ...listening];
    const wanted = [...new Set([...all, ...moving()])];
    return wanted.filter((e) => shown(e) && !e.disabled && e.tagName !== 'HTML' && e.tagName !== 'BODY').map(name);
}}"""
_UNNAMED = (
    f"() => {{ {_KNOWN} return moving().filter((e) => e.tabIndex !== 0 || !e.hasAttribute('tabindex')).map(name); }}"
)
_HERE = f"""() => {{ {_KNOWN}
    const e = document.activeElement;
    if (!e || e === document.body || e === document.documentElement) return null;
    const box = e.getBoundingClientRect();
    // The middle of what of it is in the window: nothing else lies over it.
    const middle = (low, high, size) => (Math.max(0, low) + Math.min(size, high)) / 2;
    const [x, y] = [middle(box.left, box.right, innerWidth), middle(box.top, box.bottom, innerHeight)];
    const over = document.elementFromPoint(x, y);
    const is_seen = over !== null && (e.contains(over) || over.contains(e));
    const with_mark = outline(e);
    e.blur();
    const without = outline(e);
    e.focus({{preventScroll: true, focusVisible: true}});
    const kind = e.tagName.toLowerCase();
    const details = kind === 'summary' ? e.parentElement : null;
    const is_closed = details ? !details.open : false;
    return {{name: name(e), kind, is_seen, is_marked: with_mark !== without, is_closed}};
}}"""
_IS_DRAWN = """() => {
    const fold = document.activeElement.parentElement;
    const is_filled = !fold.matches('.data') || fold.dataset.drawn === 'yes';
    return is_filled && document.documentElement.dataset.charts !== 'drawing';
}"""


def remember(page: Any) -> None:
    """To be called before the page is opened. What has the focus is scrolled to at once, as for who wants no motion."""
    page.emulate_media(reduced_motion="reduce")
    page.add_init_script(REMEMBER)


def wanted(page: Any) -> list[str]:
    """Everything on the page that a mouse can use: what can be clicked, what listens to clicks, and what scrolls."""
    return page.evaluate(_WANTED)


def walk(page: Any, key: str = "Tab", unfolds: bool = False, limit: int = 20_000) -> list[dict[str, Any]]:
    """Where a key leads, from the page's beginning (Shift+Tab: its end) until the focus leaves the page.

    unfolds: whether Enter and Space, by turns, open each closed fold that is met.
    Raises:
        AssertionError: where the focus never leaves the page, or stays on one element.
    """
    page.evaluate("() => { document.activeElement?.blur(); getSelection().removeAllRanges(); scrollTo(0, 0); }")
    met: list[dict[str, Any]] = []
    for _ in range(limit):
        page.keyboard.press(key)
        here = page.evaluate(_HERE)
        if here is None:
            if met:
                return met
            continue
        assert not met or here["name"] != met[-1]["name"], f"the focus is caught at {here['name']}"
        if met and here["name"] == met[0]["name"]:
            return met
        met.append(here)
        if unfolds and here["is_closed"]:
            opens = ("Enter", "Space")[len(met) % 2]
            page.keyboard.press(opens)
            assert settled(page, "() => document.activeElement.parentElement.open", True), (
                f"{opens} opens nothing: {here}"
            )
            # The page hears of the opening a little later, and then draws what was folded.
            page.evaluate(
                "() => new Promise((next) => setTimeout(() => requestAnimationFrame(() => setTimeout(next))))"
            )
            assert settled(page, _IS_DRAWN, True)
    raise AssertionError(f"the focus does not leave the page within {limit} steps; it is at {met[-1]['name']}")


def assert_keyboard_reaches_everything(page: Any, unfolds: bool = False) -> list[dict[str, Any]]:
    """Tab, and Shift+Tab backwards, reach all that a mouse can use, show where they are, and leave the page again."""
    met = walk(page, unfolds=unfolds)
    # Chromium lets Tab reach whatever scrolls; other browsers want to be told.
    assert page.evaluate(_UNNAMED) == []
    reached = {here["name"] for here in met}
    assert [name for name in wanted(page) if name not in reached] == []
    assert [here["name"] for here in met if not here["is_marked"]] == []
    assert [here["name"] for here in met if not here["is_seen"]] == []
    if not unfolds:
        back = walk(page, "Shift+Tab")
        assert {here["name"] for here in back} >= set(wanted(page))
    return met


def clicks_of(page: Any, key: str) -> int:
    """How many clicks a key makes at the element that has the focus."""
    before = page.evaluate("window.clicked")
    page.keyboard.press(key)
    return page.evaluate("window.clicked") - before
