"""Turn a report into Markdown and into one HTML page, which needs no network and no script."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dualoptim.reporting import plots
from dualoptim.reporting.commands import FLAG, said_and_typed
from dualoptim.reporting.tables import Table


@dataclass(frozen=True)
class Plot:
    """A figure: its name, what it shows in one sentence (for those who do not see it), and how it is drawn."""

    name: str
    says: str
    draw: plots.Draw

    @cached_property
    def picture(self) -> plots.Picture:
        """The figure, drawn once."""
        return plots.render(self.draw)

    @property
    def file(self) -> str:
        """The name of its PNG."""
        name = re.sub(r"[^\w.+-]+", "-", self.name)
        return f"{name if len(name) <= 120 else f'{name[:60]}-{name[-60:]}'}.png"

    def svg(self, number: int) -> Markup:
        """Return the SVG element of the page's figure `number`, whose ids no other figure has."""
        return Markup(re.sub(r'((?<=\s)id="|xlink:href="#|url\(#)', rf"\1figure{number}-", self.picture.svg))


@dataclass(frozen=True)
class Answers:
    """A question and what was answered: pairs of who and what."""

    question: str
    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of a report under its title, in the order in which it is read. True if anything stands in it."""

    title: str
    lead: str = ""
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()  # to be copied
    notes: Sequence[str] = ()
    points: Sequence[str] = ()  # a list; a command may end each, on a line of its own
    folded: tuple[str, str] | None = None  # a long text, hidden away under its title
    plots: Sequence[Plot] = ()
    answers: Sequence[Answers] = ()
    parts: Sequence["Section"] = ()

    def __bool__(self) -> bool:
        """Tell whether anything stands under the title."""
        said = (self.lead, self.points, self.commands, self.notes, self.folded, self.plots, self.answers)
        return any((*said, any(self.tables), any(self.parts)))

    def all_plots(self) -> list[Plot]:
        """List the figures of this section and of those in it."""
        return [*self.plots, *(plot for part in self.parts for plot in part.all_plots())]


def to_markdown(section: Section, level: int = 1) -> str:
    """Write a section in Markdown; its figures are the PNGs in report/."""
    blocks = [f"{'#' * level} {_plain(section.title)}"]
    blocks += [_plain(section.lead)] if section.lead else []
    blocks += ["\n".join(map(_point, section.points))] if section.points else []
    blocks += [table.markdown(_plain) for table in section.tables if table]
    blocks += ["\n".join(f"    {command}" for command in section.commands)] if section.commands else []
    blocks += map(_plain, section.notes)
    blocks += [_folded(*section.folded)] if section.folded else []
    blocks += [f"![{_plain(plot.says)}](report/{plot.file})" for plot in section.plots]
    for one in section.answers:
        lines = [f"**{_plain(one.question)}**", "", *(f"- {who}: {_plain(what)}" for who, what in one.pairs)]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *(to_markdown(part, level + 1).rstrip("\n") for part in section.parts if part)]) + "\n"


def _point(point: str) -> str:
    said, command = said_and_typed(point)
    return f"- {_plain(said)}" + (f"\n\n      {command}\n" if command else "")


def _folded(title: str, text: str) -> str:
    # a fence longer than any run of backticks within
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"<details><summary>{html.escape(title)}</summary>\n\n{fence}yaml\n{text}{fence}\n\n</details>"


def _plain(text: str) -> str:
    """Write text in which nothing is Markdown or HTML."""
    # an underscore within a word is none: commands and names can be copied as they stand
    return re.sub(r"([\\`*\[\]<>|#&~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def _flags(text: str) -> Markup:
    """Mark the flags of a text, at whose dashes a browser would break it."""
    return Markup(FLAG.sub(r"<code>\g<0></code>", str(escape(text))))


def to_html(report: Section) -> str:
    """Write a report as one page, with everything that it shows inside it, for light and for dark screens."""
    source = files("dualoptim.reporting").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    numbers = {id(plot): number for number, plot in enumerate(report.all_plots(), 1)}
    environment.filters |= {"flags": _flags, "apart": said_and_typed}
    page = environment.from_string(source)
    return page.render(report=report, palette=plots.PALETTE, svg=lambda plot: plot.svg(numbers[id(plot)])) + "\n"
