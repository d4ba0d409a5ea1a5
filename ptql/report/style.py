"""The page's style sheet: light and dark, screen and paper. Shades of one blue carry the data, orange the warnings."""

CSS = """
:root {
  --paper: #ffffff; --ink: #1c2024; --muted: #5c6570; --rule: #e3e6ea; --soft: #f5f7f9;
  --before: #8a94a0; --before-fill: #cdd3da; --after: #0b63ce; --warn: #b54708; --warn-soft: #fff6ed;
  --heat: #0a4fa8; --kind1: #5aa0ee; --kind2: #1f9e89; --kind3: #a3ABB5; --kind4: #d0d5db;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e8eaed; --muted: #a0a8b2; --rule: #2d3339; --soft: #1c2126;
    --before: #8f99a5; --before-fill: #434b54; --after: #6cb2ff; --warn: #ffab5e; --warn-soft: #2b2017;
    --heat: #7cc0ff; --kind1: #3d79bb; --kind2: #3fb8a2; --kind3: #737d88; --kind4: #454d56;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
main, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
.kicker { margin: 0; color: var(--muted); font-size: .875rem; letter-spacing: .02em; }
h1 { margin: .1rem 0 .6rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
h1 .recipe { color: var(--muted); font-weight: 500; white-space: nowrap; }
h2 { margin: 0 0 .5rem; font-size: 1.3rem; line-height: 1.3; letter-spacing: -.01em; }
h3 { margin: 1.4rem 0 .1rem; font-size: 1rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
.verdict { font-size: 1.15rem; line-height: 1.5; overflow-wrap: anywhere; }
section { margin-top: 2.6rem; padding-top: 1.6rem; border-top: 1px solid var(--rule); }
.hint-line, .absent, .fine, footer { color: var(--muted); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.4rem 0; }
.tiles > div { background: var(--soft); border-radius: 8px; padding: .8rem 1rem; min-width: 0; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.tiles .value { font-size: 1.6rem; font-weight: 600; line-height: 1.25; letter-spacing: -.01em; }
.tiles .note { color: var(--muted); font-size: .85rem; }
.warnings { background: var(--warn-soft); border: 0; border-left: 4px solid var(--warn); border-radius: 4px;
  margin-top: 1.4rem; padding: .9rem 1.1rem; }
.warnings h2 { font-size: 1rem; color: var(--warn); }
.warnings ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.flag { color: var(--warn); font-weight: 600; }
figure { margin: 1rem 0; min-width: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .3rem; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em; }
code { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .8rem 2.2rem; }
.chart { padding-right: .6rem; margin-bottom: .4rem; }
.unit, .scale { margin: .3rem 0 .5rem; color: var(--muted); font-size: .8rem; }
.plot { margin-left: 3.1rem; }
.plot.wide { margin-left: 6.4rem; }
svg { display: block; overflow: visible; }
.scale svg { display: inline-block; vertical-align: -1px; margin: 0 .35rem; outline: 1px solid var(--rule); }
svg text { font-size: 12px; fill: var(--muted); }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
svg .grid { stroke: var(--rule); }
svg .base { stroke: var(--before); }
svg .inner { overflow: hidden; }
.line { fill: none; stroke-width: 1.75; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.line.before { stroke: var(--before); }
.line.after { stroke: var(--after); }
.area.before { fill: var(--before-fill); }
circle.before { fill: var(--paper); stroke: var(--before); stroke-width: 1.5; }
circle.after { fill: var(--after); }
circle.fell { fill: var(--warn); }
rect.before { fill: var(--before-fill); }
rect.after { fill: var(--after); }
rect.stem { fill: var(--before); }
svg .cross { fill: var(--warn); font-size: 16px; font-weight: 700; }
.hint { fill: transparent; }
.hint:hover { fill: var(--muted); fill-opacity: .14; }
.heat rect { fill: var(--heat); stroke: var(--paper); stroke-width: 1; }
.heat.tight rect, .scale .heat rect { stroke: none; shape-rendering: crispEdges; }
.heat rect.none { fill: none; stroke: var(--rule); }
.heat rect:hover { stroke: var(--ink); stroke-width: 1.5; }
.strip rect { stroke: var(--paper); stroke-width: 1; }
.kind0 { fill: var(--after); background: var(--after); }
.kind1 { fill: var(--kind1); background: var(--kind1); }
.kind2 { fill: var(--kind2); background: var(--kind2); }
.kind3 { fill: var(--kind3); background: var(--kind3); }
.kind4 { fill: var(--kind4); background: var(--kind4); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; margin: .2rem 0 .5rem; padding: 0;
  color: var(--muted); font-size: .85rem; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: .4rem; border-radius: 50%; }
.legend i.before { border: 2px solid var(--before); }
.legend i.after { background: var(--after); }
.legend i.fell { background: var(--warn); }
.legend i.box, .legend i[class^="kind"] { border-radius: 2px; border: 0; }
.legend i.before.box { background: var(--before-fill); }
.legend i.cross { border-radius: 0; width: auto; height: auto; }
.legend i.cross::before { content: "×"; color: var(--warn); font-style: normal; font-weight: 700; }
.scroll { overflow-x: auto; margin: .4rem 0 .8rem;  /* a shade at the edge behind which there is more */
  background: linear-gradient(to right, var(--paper) 1.2rem, transparent 2.4rem) left / 2.4rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 1.2rem, transparent 2.4rem) right / 2.4rem 100% no-repeat local,
    linear-gradient(to right, var(--rule), transparent) left / .7rem 100% no-repeat scroll,
    linear-gradient(to left, var(--rule), transparent) right / .7rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: .82rem; }
th.n, td.n { text-align: right; }
th:last-child, td:last-child { padding-right: .2rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--after); font-size: .95rem; }
pre { background: var(--soft); border-radius: 8px; padding: 1rem; overflow-x: auto; line-height: 1.45; }
.facts { margin: .4rem 0 1rem; }
.facts > div { display: grid; grid-template-columns: 8rem 1fr; gap: 1rem; padding: .35rem 0;
  border-bottom: 1px solid var(--rule); font-size: .95rem; }
.facts dt { font-size: .9rem; }
footer { padding-top: 2rem; padding-bottom: 3rem; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  main, footer { padding: 0 1rem; }
  header { padding-top: 1.4rem; }
  h1 { font-size: 1.6rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles .value { font-size: 1.3rem; }
  .facts > div { grid-template-columns: 1fr; gap: 0; }
  .spread { display: none; }
  th, td { padding-right: .7rem; }
}
@media print {
  @page { margin: 15mm; }
  body { font-size: 10.5pt; }
  main, footer { max-width: none; padding: 0; }
  figure, .tiles > div, tr, .warnings { break-inside: avoid; }
  h2, h3, figcaption, .unit { break-after: avoid; }
  .scroll, pre { overflow: visible; background: none; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  details.figures::details-content { content-visibility: visible; height: auto; }
  summary { list-style: none; color: var(--muted); }
}
"""
