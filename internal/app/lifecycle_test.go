package app

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPartsStopInReverseWhateverFails(t *testing.T) {
	var p Lifecycle
	var stopped []string
	part := func(name string, err error) {
		p.Add(name, func(context.Context) error {
			stopped = append(stopped, name)
			return err
		})
	}
	part("first", nil)
	part("second", errors.New("broken"))
	part("third", nil)
	err := p.Stop(t.Context())
	if !slices.Equal(stopped, []string{"third", "second", "first"}) {
		t.Errorf("stopped %v", stopped)
	}
	if err == nil || !strings.Contains(err.Error(), "stop second: broken") {
		t.Errorf("error %v", err)
	}
	if err := p.Stop(t.Context()); err != nil || len(stopped) != 3 {
		t.Errorf("a second stop: %v, stopped %v", err, stopped)
	}
}

func TestStartThatFailsStopsItsParts(t *testing.T) {
	stops := 0
	start := func(fail error) (err error) {
		var p Lifecycle
		defer p.StopAfter(t.Context(), &err)
		p.Add("part", Closing(func() { stops++ }))
		return fail
	}
	if err := start(nil); err != nil || stops != 0 {
		t.Errorf("a start that works: %v, %d stops", err, stops)
	}
	if err := start(errors.New("no")); err == nil || stops != 1 {
		t.Errorf("a start that fails: %v, %d stops", err, stops)
	}
}

func TestBoundsOfStops(t *testing.T) {
	over, cancel := context.WithCancel(t.Context())
	cancel()
	left := func(ctx context.Context) time.Duration {
		deadline, ok := ctx.Deadline()
		if !ok || ctx.Err() != nil {
			return 0
		}
		return time.Until(deadline)
	}
	check := func(low, high time.Duration) func(context.Context) error {
		return func(ctx context.Context) error {
			if d := left(ctx); d < low || d > high {
				t.Errorf("%v left, want %v to %v", d, low, high)
			}
			return nil
		}
	}
	_ = WithGrace(check(time.Millisecond, grace))(over)
	_ = WithTimeout(time.Minute, check(0, 0))(over)
	_ = WithTimeout(time.Minute, check(time.Second, time.Minute))(t.Context())
}
