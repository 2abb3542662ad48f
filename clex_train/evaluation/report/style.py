"""The style of the report's page: light and dark, wide and narrow, and on paper."""

LIGHT = (
    "--page:#ffffff;--ink:#24292f;--grey:#656d76;--grid:#dfe3e7;--rule:#d0d7de;--mark:#e3f1fb;--link:#0060a8;"
    "--s0:#0072b2;--s1:#d55e00;--s2:#00855f;--s3:#b85a92;--s4:#b87800;--s5:#2f8fc4;--s6:#8c564b;--s7:#7b61b5"
)
DARK = (
    "--page:#15191d;--ink:#e4e8ec;--grey:#9aa4ae;--grid:#30373e;--rule:#3b434b;--mark:#17354a;--link:#78bdf0;"
    "--s0:#4ea3dc;--s1:#f08a45;--s2:#33c197;--s3:#e29cc6;--s4:#edb13c;--s5:#8fd0f5;--s6:#c9968c;--s7:#ad98e0"
)
"""The hues of the figures, lighter: they stand on a dark ground."""

CSS = (
    f":root{{color-scheme:light dark;{LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    """
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:1.5rem 1.25rem 4rem;background:var(--page);color:var(--ink);
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;margin:2.6rem 0 .8rem;padding-top:.7rem;border-top:1px solid var(--rule);
 overflow-wrap:anywhere}
h3{font-size:1rem;margin:0 0 .5rem;overflow-wrap:anywhere}
p,figcaption{color:var(--grey);font-size:.88rem;margin:.6rem 0;overflow-wrap:anywhere}
a{color:var(--link)}
code{font-size:.92em;overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;line-height:1.3}
th,td{padding:.4rem .75rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{font-weight:600;vertical-align:bottom}
th:first-child{text-align:left;font-weight:500;position:sticky;left:0;background:var(--page);padding-left:0}
small{display:block;color:var(--grey);font-size:.8em;font-weight:400}
small:empty{display:none}
td.best{background:var(--mark);font-weight:700}
td.source{text-align:center}
figure{margin:0 0 2.6rem;break-inside:avoid}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif!important}
.narrow{display:none}
dl{margin:0;display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;font-size:.88rem}
dt{color:var(--grey)}
dd{margin:0;overflow-wrap:anywhere}
ol.sources{padding-left:1.4rem}
ol.sources li{margin-bottom:1.4rem;break-inside:avoid}
li:target{outline:2px solid var(--link);outline-offset:.5rem}
@media (max-width:40rem){
 body{padding:1rem .9rem 3rem}
 figure>.wide{display:none}
 .narrow{display:block}
 th,td{padding:.4rem .5rem}
 th:first-child{white-space:normal;min-width:6.5rem;max-width:9rem;overflow-wrap:anywhere}
 dl{grid-template-columns:minmax(0,1fr);gap:0}
 dd{margin-bottom:.5rem}
}
"""
    f"@media print{{:root{{color-scheme:light;{LIGHT}}}body{{max-width:none;padding:0}}a{{text-decoration:none}}"
    "figure>.wide{display:block}.narrow{display:none}.scroll{overflow:visible}h2,h3{break-after:avoid}tr{break-inside:avoid}}"
)
