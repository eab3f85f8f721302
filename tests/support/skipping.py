"""What a test that is about skipping must have: that something was skipped, and from which sizes on."""

from dataclasses import replace

from approxdrop_lightning import policy


def set_thresholds(monkeypatch, device="cpu", **given):
    """Take thresholds in the place of those measured on a device; those that are not given are 0."""
    nothing = replace(policy.THRESHOLDS[device], **dict.fromkeys(vars(policy.THRESHOLDS[device]), 0))
    monkeypatch.setitem(policy.THRESHOLDS, device, replace(nothing, **given))


def assert_skips(report, *names, everywhere=False):
    """Fail unless the report says that something was skipped.

    Args:
        report: Of a model that has made a step.
        *names: Dropouts by which something must be skipped; without any, one dropout must.
        everywhere: Whether all must.
    """
    chosen = [report[name] for name in names] if names else [row for row in report if row.site]
    skipping = [row.name for row in chosen if row.site.skips]
    wanted = len(chosen) if names or everywhere else 1
    assert len(skipping) >= wanted and report.saved > 0, f"skipped by {skipping or 'nothing'} only:\n{report}"
