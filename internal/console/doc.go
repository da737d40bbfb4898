// Package console is the page at /console/, and what it shows: one snapshot for all who look, made once a second at most and
// while somebody looks, warnings out of the log, and the settings in force.
//
// The page is plain HTML, CSS and ES modules (page/), served as they are. It keeps the history itself. uPlot
// (https://github.com/leeoniya/uPlot, MIT) in page/uplot draws the charts.
package console
