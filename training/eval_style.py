"""How the page of an evaluation looks, light and dark; see ``eval_page``."""

STYLE = """
:root { --paper: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #5d6778; --line: #d9dee6; --bar: #4472c4;
  --sure: #1a7f4b; --guess: #b3402a; --prior: #d98200; --shuffled: #8a4fc0; --right: 68 114 196; --wrong: 205 70 45; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --card: #1d232d; --ink: #e8ecf2; --soft: #9aa6b8;
  --line: #343d4b; --bar: #6d97e0; --sure: #4cc38a; --guess: #f08a70; --prior: #f0b040; --shuffled: #c39bf0;
  --right: 90 140 225; --wrong: 225 95 70; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; font-weight: 650; margin: 0; }
header p { margin: .2rem 0 1.4rem; color: var(--soft); }
h2 { font-size: 1.1rem; font-weight: 650; margin: 0 0 .2rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1.1rem 1.3rem;
  margin-top: 1.2rem; }
.note { margin: 0 0 .8rem; color: var(--soft); font-size: .87rem; max-width: 60rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile strong { display: block; font-size: 1.9rem; line-height: 1.15; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tile i { font-size: 1rem; font-style: normal; font-weight: 400; color: var(--soft); margin-left: .15rem; }
.tile span { display: block; font-size: .87rem; }
small { color: var(--soft); font-size: .75rem; font-weight: 400; }
.alarm, .well { margin: 1.2rem 0 0; padding: .6rem 1rem; border: 1px solid var(--line); border-left: .3rem solid;
  border-radius: .4rem; background: var(--card); font-size: .92rem; }
.alarm { border-left-color: var(--guess); }
.alarm b { color: var(--guess); margin-right: .4rem; }
.well { border-left-color: var(--sure); }
.well b { color: var(--sure); margin-right: .4rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(29rem, 100%), 1fr)); gap: 1.2rem;
  align-items: start; margin-top: 1.2rem; }
.columns section { margin: 0; padding: 1rem 1.1rem; min-width: 0; }
.columns td small, .columns th small { display: block; margin: 0; }
.columns td, .columns th { padding-left: .35rem; padding-right: .35rem; }
.wide { overflow-x: auto; }
.wide + .wide { margin-top: 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
thead th { font-weight: 500; color: var(--soft); font-size: .78rem; text-align: right; vertical-align: bottom;
  padding: .25rem .6rem; }
thead th:first-child { padding-left: 0; }
td, th[scope=row] { border-top: 1px solid var(--line); padding: .28rem .6rem; vertical-align: middle; }
td { text-align: right; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 400; padding-left: 0; }
td small, th small { margin-left: .45rem; white-space: nowrap; }
b { font-weight: 650; }
.types { width: 100%; }
.types th[scope=row] { white-space: nowrap; }
.types td:nth-child(2) { width: 34%; min-width: 11rem; }
.types td:nth-child(3) { white-space: nowrap; }
.bar { position: relative; height: .95rem; background: var(--line); border-radius: .2rem; }
.bar span { position: absolute; inset: 0 auto 0 0; background: var(--bar); border-radius: .2rem; }
.bar em { position: absolute; top: 50%; height: .16rem; margin-top: -.08rem; background: var(--ink); }
.tick { position: absolute; top: -.12rem; bottom: -.12rem; width: .2rem; margin-left: -.1rem; border-radius: .1rem;
  background: var(--prior); box-shadow: 0 0 0 1px var(--card); }
.tick.shuffled { background: var(--shuffled); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .2rem 0 .6rem; font-size: .82rem;
  color: var(--soft); }
.key { display: inline-flex; align-items: center; gap: .4rem; }
.key i { position: static; display: inline-block; margin: 0; }
.key .tick { height: 1rem; }
.swatch { width: 1.1rem; height: .8rem; background: var(--bar); border-radius: .15rem; }
.line { width: 1.1rem; height: .16rem; background: var(--ink); }
.confusion td { text-align: center; min-width: 2.6rem; border: 1px solid var(--line); padding: .25rem .3rem; }
.confusion thead th { text-align: center; padding: .25rem .3rem; }
.confusion th[scope=row] { border: 0; padding-right: .7rem; text-align: right; }
.confusion td.n { border: 0; color: var(--soft); text-align: right; padding-left: .8rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.1rem, 1fr)); gap: .8rem; }
.cards figure { margin: 0; border: 1px solid var(--line); border-top: .22rem solid var(--sure); border-radius: .45rem;
  padding: .55rem; background: var(--paper); overflow-wrap: anywhere; }
.cards figure.wrong { border-top-color: var(--guess); }
.cards img { display: block; width: 100%; height: 9rem; object-fit: contain; image-rendering: pixelated; }
figcaption { font-size: .85rem; margin-top: .45rem; }
figcaption span { display: block; }
.asked { color: var(--soft); line-height: 1.3; }
.said { margin-top: .2rem; font-size: .95rem; }
.right .said b { color: var(--sure); }
.wrong .said b { color: var(--guess); }
.expected { color: var(--ink); }
.texts td, .texts th[scope=row], .texts thead th { text-align: left; vertical-align: top; }
.facts { width: 100%; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts th { width: 8rem; color: var(--soft); vertical-align: top; }
.facts small { display: block; margin: 0; white-space: normal; }
code { font: .85rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 46rem) { body { padding: 1rem .8rem 2rem; } section { padding: .9rem; } }
"""
