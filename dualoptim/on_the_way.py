"""Measure and save a model between the steps of its unlearning, and keep the best that was measured."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dualoptim.atomic import write_json
from dualoptim.budget import OfTask, between_steps
from dualoptim.evaluate import evaluate_model
from dualoptim.evaluation.summary import Summary
from dualoptim.job import Job
from dualoptim.method.schedule import Plan
from dualoptim.models.export import export_model
from dualoptim.models.launch import decided
from dualoptim.models.loaded import LoadedModel
from dualoptim.models.saving import step_folder
from dualoptim.reporting.log import track_scores
from dualoptim.reporting.runs import measured_steps

BEST = "best"


@dataclass(frozen=True)
class OnTheWay(OfTask):
    """Does to the model of one task what `--eval-every`, `--save-model-every` and `--keep-best` say."""

    job: Job
    position: int  # of the task in the list
    plan: Plan  # after whose last step the model is measured and saved anyway
    card: str

    def after(self, step: int, loaded: LoadedModel) -> None:
        """Measure and save the model that trains, after a step, where that is due; training goes on as if nothing had been."""
        args, per_epoch = self.job.args, self.plan.steps_per_epoch
        saves, measures = args.saves_model_after(step, per_epoch), args.measures_after(step, per_epoch)
        if step == self.plan.last_step or not (saves or measures):
            return
        place = step_folder(loaded.accelerator, self.folder, step)
        if saves:
            export_model(loaded, place / "model", self.card, args.save_dtype)
        if measures:
            summary = self._measure(loaded, place / "eval")
            track_scores(loaded.accelerator, "eval", summary, step)
            if self._is_best(step, summary):
                export_model(loaded, self.folder / BEST, self.card, args.save_dtype)
                self._note(step, summary)

    def end(self, last: int, summary: Summary) -> None:
        """Write down which model is the best one, now that the one after the `last` step that was taken has been measured."""
        level = self.job.args.keep_best
        if level is not None and self.job.accelerator.is_main_process:
            known = {**measured_steps(self.folder), last: summary}
            best = max(known, key=lambda step: (goodness(known[step], level), -step))
            self._note(best, known[best], "model" if best == last else BEST)

    def _measure(self, loaded: LoadedModel, folder: Path) -> Summary:
        """Measure a model as it is measured once it is saved, but for its general ability; random numbers stay as they are."""
        measures = self.job.measures
        assert measures is not None
        measures = replace(measures, args=replace(measures.args, lm_eval_tasks=(), lm_eval_path=None, lm_eval_data=None))
        with between_steps(loaded) as training:
            return evaluate_model(training, self.job.evaluation_sets(self.position), measures, folder)

    def _is_best(self, step: int, summary: Summary) -> bool:
        """Tell whether no model that was measured after an earlier step is as good; the same on all processes."""
        level = self.job.args.keep_best
        if level is None:
            return False
        own = goodness(summary, level)

        def compare() -> bool:
            return all(own > goodness(one, level) for number, one in measured_steps(self.folder).items() if number < step)

        return decided(self.job.accelerator, compare)

    def _note(self, step: int, summary: Summary, place: str = BEST) -> None:
        """Write down which model is the best one so far, and where it lies."""
        if self.job.accelerator.is_main_process:
            write_json(self.folder / "best.json", {"step": step, "folder": place, **_scores(summary)})


def _scores(summary: Summary) -> Mapping[str, float | None]:
    retain = summary.sets.get("retain", {}).get("probability")
    utility = retain if summary.model_utility is None else summary.model_utility
    return {"forget_probability": summary.sets.get("forget", {}).get("probability"), "utility": utility}


def goodness(summary: Summary, level: float) -> tuple[bool, float]:
    """Rank a model, higher is better, by the rule of `--keep-best`.

    Models whose forget probability is at most `level` come first, by their utility; then the others, by how little of the
    forget set they know. Utility is the model utility, or the retain set's probability where that was not measured.
    """
    scores = _scores(summary)
    forget, utility = (-1.0 if value is None else value for value in (scores["forget_probability"], scores["utility"]))
    return (True, utility) if forget <= level else (False, -forget)
