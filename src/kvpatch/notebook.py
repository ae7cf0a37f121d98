"""A run directory in a notebook: its trials as data frames, its verdicts, its charts. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import pandas as pd

from kvpatch.errors import KvpatchError, ProtocolError, as_html, missing_extra, visible
from kvpatch.offline import drawn_offline
from kvpatch.report.build import watched_rows
from kvpatch.specs.arguments import shown
from kvpatch.specs.attention import STATISTICS
from kvpatch.specs.nearest import instead
from kvpatch.specs.readouts import MODE
from kvpatch.store.directory import Store
from kvpatch.store.record import RunRecord
from kvpatch.verdicts.outcome import Outcome, outcome_of

if TYPE_CHECKING:
    import polars

    from kvpatch.report.charts import AnyChart, Drawn
    from kvpatch.report.figure import Figure


class Run:
    """What a run directory holds, read when it is asked for; `refresh` reads it anew.

    `Run("results").trials()`, `.verdicts()`, `.effects()`, `.plot.forest()`. In a notebook its last line shows the
    answer, the instruments and the verdicts.

    Raises:
        StoreError: where the directory holds no run, or a stored part is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.store = Store(directory)
        self.store.read_record()
        self.store.done()
        self.plot = Plots(self)

    @property
    def directory(self) -> str:
        """Where the run is."""
        return str(self.store.directory)

    @property
    def record(self) -> RunRecord:
        """run.json."""
        return self.store.read_record()

    @cached_property
    def outcome(self) -> Outcome:
        """Protocol, light rows and verdicts, decided from the trials stored when it was first asked for."""
        return outcome_of(self.store)

    def refresh(self) -> Run:
        """Forget what was read; returns the run itself."""
        for name in ("outcome", "_figures"):
            self.__dict__.pop(name, None)
        return self

    @property
    def figures(self) -> dict[str, str]:
        """The figures of the report that have data: id -> title. `figure(id)` gives one for a paper."""
        return {name: found.title for name, found in self._figures.items()}

    def figure(self, name: str, *, inches: float = 3.25) -> dict[str, Any]:
        """One figure of the report as Vega-Lite with its numbers, for a paper: in points (72 to the inch), on white.

        Args:
            name: one of `figures`. inches: how wide.
        Raises:
            ProtocolError: for a figure that there is not, or a width that no page has.
        """
        from kvpatch.report.paper import chosen, paper_spec

        return paper_spec(chosen(self._figures, [name])[0], inches)

    @staticmethod
    def drawn(figure: dict[str, Any], inches: float) -> dict[str, bytes]:
        """What `figure` gave, as files of that width: ".svg", ".pdf" and ".png" (300 dots per inch) -> content."""
        from kvpatch.report.paper import drawn

        return drawn(figure, inches)

    @cached_property
    def _figures(self) -> dict[str, Figure]:
        from kvpatch.report.build import report_figures

        return report_figures(self.store, self.outcome)

    @overload
    def trials(self, kind: Literal["pandas"] = "pandas") -> pd.DataFrame: ...
    @overload
    def trials(self, kind: Literal["polars"]) -> polars.DataFrame: ...
    def trials(self, kind: str = "pandas") -> Any:
        """Every trial with every column (`kvpatch.store.columns.TRIAL_COLUMNS`), as a pandas or a Polars frame.

        Raises:
            StoreError: where there are no trials, or a part is damaged.
            ProtocolError: for another kind.
            MissingExtra: for a Polars frame where Polars is not installed.
        """
        _refuse_kind(kind)
        if kind == "polars":
            return _polars().from_arrow(self.store.read())
        return self.store.read().to_pandas()

    @overload
    def verdicts(self, kind: Literal["pandas"] = "pandas") -> pd.DataFrame: ...
    @overload
    def verdicts(self, kind: Literal["polars"]) -> polars.DataFrame: ...
    def verdicts(self, kind: str = "pandas") -> Any:
        """One row a hypothesis, with the fields of verdicts.json: a pandas frame indexed by the hypotheses' ids, or a
        Polars frame with a column `id`.

        Raises:
            ProtocolError: for another kind.
            MissingExtra: for a Polars frame where Polars is not installed.
        """
        _refuse_kind(kind)
        if kind == "polars":
            rows = [verdict.model_dump(mode="json") for verdict in self.outcome.verdicts]
            return _polars().DataFrame(rows, infer_schema_length=None)
        frame = pd.DataFrame([verdict.model_dump() for verdict in self.outcome.verdicts])
        return frame.set_index("id")

    def plan_table(self) -> pd.DataFrame:
        """One row per row of the protocol's plan: what it expected, what was measured, a verdict and one sentence."""
        return pd.DataFrame([row.model_dump() for row in self.outcome.plan_table])

    def effects(self) -> pd.DataFrame:
        """One row a condition and readout: its difference from the natural run of the same prompt."""
        return pd.DataFrame([effect.model_dump() for effect in self.outcome.effects])

    @property
    def answer(self) -> str:
        """The one-sentence answer."""
        return self.outcome.answer

    def __repr__(self) -> str:
        record = self.record
        done = sum(part.rows for part in self.store.parts())
        which = visible(f"{record.protocol.get('protocol', 'no protocol')} on {record.model.name}")
        return f"Run({self.directory!r}: {which}, {done} of {record.planned})"

    def _repr_html_(self) -> str:
        try:
            outcome = self.outcome
        except KvpatchError as error:
            return f"<p><b>{as_html(repr(self))}</b><br>{as_html(str(error))}</p>"
        from kvpatch.report.text import number

        rows = "".join(
            f"<tr><td><b>{as_html(v.verdict)}</b></td><td>{as_html(v.id)}</td><td>{as_html(v.contrast)}</td>"
            f"<td>{as_html(v.readout)}</td><td>{number(v.estimate)}</td>"
            f"<td>{number(v.ci_low)} to {number(v.ci_high)}</td><td>{v.n}</td></tr>"
            for v in outcome.verdicts
        )
        short = "" if outcome.incomplete is None else f"<br>{as_html(outcome.incomplete)}"
        head = "".join(
            f"<th>{name}</th>" for name in ("verdict", "hypothesis", "contrast", "readout", "estimate", "interval", "n")
        )
        return (
            f"<p>{as_html(repr(self))}</p><p><b>{as_html(outcome.answer)}</b>{short}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )


class Plots:
    """The report's charts, as altair charts: `run.plot.conditions("mode_llr")`. `dir(run.plot)` lists them.

    A notebook shows them without a network."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def conditions(self, readout: str = MODE, phase: str | None = None) -> AnyChart:
        """Each condition's mean with its interval, over how its pairs spread."""
        from kvpatch.report import charts, tables

        protocol = self._run.outcome.protocol
        phase = self._phase(phase)
        rows = self._tested()
        known = [name for name in rows.columns if str(rows[name].dtype).startswith(("float", "int"))]
        readout = _among("readout", readout, known)
        _, means = tables.condition_means(rows[rows["phase"] == phase], readout, protocol)
        drawn = charts.conditions_chart(means, readout, tables.baseline_of(protocol))
        return drawn_offline(charts.built(drawn))

    def coherence(self, phase: str | None = None) -> AnyChart:
        """Share of coherent outputs a condition."""
        from kvpatch.report import charts, tables

        protocol = self._run.outcome.protocol
        phase = self._phase(phase)
        rows = self._tested()
        return drawn_offline(charts.coherence_chart(tables.coherence(rows[rows["phase"] == phase], protocol)))

    def forest(self, readout: str = MODE) -> AnyChart:
        """Every hypothesis on one readout, with its interval and margin."""
        return self._figure(lambda f: f.hypothesis_charts(self._judged(), self._run.outcome.protocol), readout)

    def effects(self, readout: str = MODE, phase: str | None = None) -> AnyChart:
        """Every condition of a phase, less the natural run of the same prompt."""
        protocol = self._run.outcome.protocol
        phase = self._phase(phase)
        return self._figure(lambda f: f.effect_charts(self._effects(), protocol, phase), readout)

    def _figure(self, charts_of: Callable[[Any], dict[str, Drawn]], wanted: str) -> AnyChart:
        from kvpatch.report import charts, forest

        found = charts_of(forest)
        return drawn_offline(charts.built(found[_among("chart of", wanted, found)]))

    def _phase(self, phase: object) -> str:
        """A phase by its name, the first if None."""
        phases = self._run.outcome.protocol.phases
        if phase is None:
            return next(iter(phases))
        return _among("phase", str(phase) if isinstance(phase, int) and phase in range(1_000) else phase, phases)

    def trajectory(self, phase: str = "5", column: str = "rv_forced_trajectory") -> AnyChart:
        """R_V along the tokens, a line a condition."""
        from kvpatch.report import head_charts as attention_charts
        from kvpatch.report import head_maps as attention

        outcome = self._run.outcome
        phase = self._phase(phase)
        rows, _ = watched_rows(self._run.store, outcome)
        column = _among("column", column, [name for name in rows.columns if str(name).endswith("_trajectory")])
        window = outcome.protocol.readouts.r_v.window
        return drawn_offline(attention_charts.trajectory_chart(attention.trajectories(rows, phase, column, window)))

    def heads(self, statistic: str = "mass_body", contrast: str = "C - N1", phase: str = "6") -> AnyChart:
        """A map of heads: the difference of a statistic of attention between conditions."""
        from kvpatch.report import head_charts as attention_charts
        from kvpatch.verdicts.head_contrasts import head_differences

        phase, statistic = self._phase(phase), _among("statistic", statistic, STATISTICS)
        if not isinstance(contrast, str):
            raise ProtocolError(f"a contrast must be text, such as 'C - N1', got {shown(contrast)}")
        rows, heads = watched_rows(self._run.store, self._run.outcome)
        found = head_differences(rows, heads, phase=phase, contrast=contrast, statistic=statistic)
        return drawn_offline(attention_charts.head_map_chart(found, f"{statistic}, {contrast}"))

    def narrowing(self, hypothesis: str) -> AnyChart:
        """How the interval of a hypothesis narrows with the pairs."""
        from kvpatch.report import charts
        from kvpatch.view import estimates

        outcome = self._run.outcome
        found = {item["id"]: item for item in estimates.estimates(outcome.protocol, outcome.rows)}
        item = found[_among("hypothesis with trials", hypothesis, found)]
        return drawn_offline(charts.built(estimates.narrowing_chart(item["path"], item["readout"], item["counts"])))

    def _tested(self) -> pd.DataFrame:
        from kvpatch.report import tables

        return tables.normalised(self._run.outcome.rows)

    def _judged(self) -> list[dict]:
        from kvpatch.report.judgements import verdict_rows

        outcome = self._run.outcome
        return verdict_rows([v.model_dump() for v in outcome.verdicts], outcome.protocol)

    def _effects(self) -> list[dict]:
        return [effect.model_dump() for effect in self._run.outcome.effects]


def _among(what: str, name: object, known: Iterable[str]) -> str:
    """A name that there is.

    Raises:
        ProtocolError: with the nearest that there is.
    """
    names = list(known)
    if not isinstance(name, str) or name not in names:
        told = instead(name, names) if isinstance(name, str) else instead("", names)
        raise ProtocolError(f"no {what} {shown(name)}; {told}")
    return name


def _polars() -> Any:
    """The package, which only these frames need."""
    try:
        import polars
    except ImportError as error:
        raise (missing_extra(error) or error) from error
    return polars


def _refuse_kind(kind: object) -> None:
    if not isinstance(kind, str) or kind not in ("polars", "pandas"):
        raise ProtocolError(f"kind is 'polars' or 'pandas', not {shown(kind)}")
