"""The page's style sheet, put inline: readable on a laptop, a phone and paper, in light and dark."""

STYLESHEET = """
:root { --ink: #22262e; --muted: #5f6672; --line: #dfe2e7; --page: #fbfbfa; --card: #fff; --accent: #0b5c94;
  --note: #fff8e6; --note-line: #e3b341; --chip: #eef1f4; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ed; --muted: #a0a8b5; --line: #343a44; --page: #15181d;
  --card: #1c2027; --accent: #7cc0f0; --note: #2b2617; --note-line: #9c7b23; --chip: #262b33; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header.top, footer { max-width: 1160px; margin: 0 auto; padding: 0 1.25rem; }
h1, h2, h3 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, Georgia, serif; line-height: 1.2;
  font-weight: 600; text-wrap: balance; }
h1 { font-size: clamp(1.6rem, 1.1rem + 2.2vw, 2.5rem); margin: 2.2rem 0 .6rem; }
h2 { font-size: clamp(1.3rem, 1.1rem + 1vw, 1.75rem); margin: 3.2rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 0 0 .4rem; }
p { max-width: 46rem; }
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
h2.first { border-top: 0; margin-top: 1rem; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; padding: 0; margin: .8rem 0 0; list-style: none; }
.chips li { background: var(--chip); border-radius: 999px; padding: .15rem .75rem; font-size: .88rem; }
nav { position: sticky; top: 0; z-index: 5; background: var(--page); border-bottom: 1px solid var(--line);
  margin-top: 1.4rem; }
nav ul { max-width: 1160px; margin: 0 auto; padding: .55rem 1.25rem; display: flex; gap: 1.1rem; list-style: none;
  overflow-x: auto; white-space: nowrap; font-size: .92rem; }
nav a { text-decoration: none; }
section { scroll-margin-top: 3rem; }
figure { margin: 1.4rem 0 2rem; background: #fff; border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden; }
figure img { display: block; width: 100%; height: auto; margin: 0 auto; padding: 1rem 1rem .25rem; background: #fff; }
figcaption { background: var(--card); color: var(--ink); border-top: 1px solid var(--line);
  padding: .75rem 1.1rem .85rem; font-size: .92rem; }
figcaption p { margin: 0; max-width: 62rem; }
figcaption .files { color: var(--muted); margin-top: .35rem; font-size: .85rem; }
.beside { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.25rem; align-items: start; }
.beside.single { grid-template-columns: minmax(0, 1fr); }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; }
.note { background: var(--note); border-color: var(--note-line); }
.notes { background: var(--note); border: 1px solid var(--note-line); border-radius: 8px; padding: .7rem 1rem;
  margin-top: .8rem; scroll-margin-top: 4rem; }
.notes ul { margin: .3rem 0 0; padding-left: 1.1rem; }
.notes li { margin: .25rem 0; max-width: 62rem; }
@media (min-width: 900px) { .findings ul { columns: 2; column-gap: 2.2rem; } .findings li { break-inside: avoid; } }
.box ul { margin: 0; padding-left: 1.1rem; }
.box li { margin: .45rem 0; }
.box p { margin: .4rem 0; }
.evidence, .small { color: var(--muted); font-size: .88rem; }
.warning { border-left: 4px solid var(--note-line); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card);
  max-height: 80vh; }
table { border-collapse: separate; border-spacing: 0; font-size: .86rem; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); z-index: 1; }
td.text { text-align: left; }
thead th { position: sticky; top: 0; background: var(--card); z-index: 2; vertical-align: bottom; font-weight: 600;
  white-space: normal; min-width: 4.2rem; line-height: 1.25; }
thead th:first-child { z-index: 3; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
td .spread { display: block; color: var(--muted); font-size: .92em; }
pre { background: var(--chip); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; font-size: .88rem; }
dl { display: grid; grid-template-columns: minmax(9rem, 14rem) minmax(0, 1fr); gap: .4rem 1.2rem; max-width: 62rem; }
dt { font-weight: 600; }
dd { margin: 0; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
footer { color: var(--muted); font-size: .85rem; padding-top: 2rem; padding-bottom: 3rem; }
@media (max-width: 820px) { .beside { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) { main, header.top, footer { padding: 0 .9rem; } nav ul { padding: .55rem .9rem; }
  figure { margin-left: -.9rem; margin-right: -.9rem; border-radius: 0; border-left: 0; border-right: 0; }
  figure img { padding: .6rem .3rem .2rem; max-width: 100% !important; }
  dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .5rem; } }
@media print { nav { display: none; } body { background: #fff; } figure, .box { break-inside: avoid; }
  .scroll { max-height: none; overflow: visible; } }
"""
