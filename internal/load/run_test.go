package load

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

type answer = func(context.Context, proto.Message) (*pubsub.DeliverySummary, error)

// inBubble runs a load in virtual time, each way.
func inBubble(t *testing.T, a answer, change func(*Config), check func(*testing.T, *server, *Result)) {
	t.Helper()
	for _, way := range []Way{Unary, Stream} {
		t.Run(way.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := start(t, a)
				defer s.close()
				cfg := s.config()
				cfg.Way, cfg.Connections = way, 1
				change(&cfg)
				res, err := Run(t.Context(), cfg)
				ok(t, err)
				check(t, s, res)
			})
		})
	}
}

func TestPushesAreSentWhenTheyAreDue(t *testing.T) {
	for name, tc := range map[string]struct {
		rate float64
		gap  time.Duration
	}{"slow": {50, 20 * time.Millisecond}, "a tick": {1000, time.Millisecond}, "fast": {5000, time.Millisecond}} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, nil, func(c *Config) { c.Rate, c.Duration = tc.rate, time.Second }, func(t *testing.T, s *server, r *Result) {
				if want := int64(tc.rate); r.Total.Pushes != want && r.Total.Pushes != want-4 || r.Total.Outcomes[Delivered] != r.Total.Pushes {
					t.Errorf("%d pushes, outcomes %v, want %d", r.Total.Pushes, r.Total.Outcomes, want)
				}
				for _, at := range s.at {
					if at.Sub(s.at[0])%tc.gap != 0 {
						t.Fatalf("a push at %v, want multiples of %v", at.Sub(s.at[0]), tc.gap)
					}
				}
				if m := r.Lag.Max(); m > lowest || r.Held.TotalCount() != 0 || r.Unsent != 0 {
					t.Errorf("late by %d, held %d, unsent %d", m, r.Held.TotalCount(), r.Unsent)
				}
				if math.Abs(r.Rate()-tc.rate) > tc.rate/100 {
					t.Errorf("rate %v", r.Rate())
				}
			})
		})
	}
}

// A server that stands still for a second owes an answer to all that was due in it,
// and the percentiles say so.
func TestAStallIsChargedToAllPushesThatWereDue(t *testing.T) {
	for name, inFlight := range map[string]int{"room for all": 10_000, "few places": 4} {
		t.Run(name, func(t *testing.T) {
			var begin time.Time
			stall := func(context.Context, proto.Message) (*pubsub.DeliverySummary, error) {
				if begin.IsZero() {
					begin = time.Now()
				}
				if since := time.Since(begin); since >= 2*time.Second && since < 3*time.Second {
					time.Sleep(3*time.Second - since)
				}
				return &pubsub.DeliverySummary{Targets: 1, Delivered: 1}, nil
			}
			inBubble(t, func(ctx context.Context, m proto.Message) (*pubsub.DeliverySummary, error) { return stall(ctx, m) },
				func(c *Config) {
					begin = time.Now()
					c.Rate, c.Duration, c.InFlight = 100, 10*time.Second, inFlight
				},
				func(t *testing.T, _ *server, r *Result) {
					h := r.Total.Latency
					within(t, "p50", time.Duration(h.ValueAtQuantile(50)), 0, time.Millisecond)
					// A tenth of the pushes was due in the stall, evenly.
					within(t, "p95", time.Duration(h.ValueAtQuantile(95)), 480*time.Millisecond, 520*time.Millisecond)
					within(t, "p99", time.Duration(h.ValueAtQuantile(99)), 880*time.Millisecond, 920*time.Millisecond)
					within(t, "max", time.Duration(h.Max()), 980*time.Millisecond, 1020*time.Millisecond)
					if r.Total.Pushes != 1000 || r.Unsent != 0 {
						t.Errorf("%d pushes, %d unsent", r.Total.Pushes, r.Unsent)
					}
					if held := r.Held.TotalCount(); (held > 0) != (inFlight == 4) || r.Full != (inFlight == 4) {
						t.Errorf("%d held with %d places", held, inFlight)
					}
					if r.Lag.Max() > lowest {
						t.Errorf("the generator takes the blame: %d", r.Lag.Max())
					}
				})
		})
	}
}

func within(t *testing.T, what string, got, low, high time.Duration) {
	t.Helper()
	if got < low || got > high {
		t.Errorf("%s is %v, want %v to %v", what, got, low, high)
	}
}

func TestAServerThatDoesNotKeepUpFallsShort(t *testing.T) {
	slow := func(context.Context, proto.Message) (*pubsub.DeliverySummary, error) {
		time.Sleep(20 * time.Millisecond)
		return &pubsub.DeliverySummary{Targets: 1, Delivered: 1}, nil
	}
	inBubble(t, slow, func(c *Config) { c.InFlight, c.Duration = 1, 4*time.Second }, func(t *testing.T, _ *server, r *Result) {
		if r.Rate() < 45 || r.Rate() > 51 {
			t.Errorf("rate %v, want about 50", r.Rate())
		}
		if sum := r.Total.Pushes + r.Unsent + r.Unfinished; sum != 400 || r.Unsent < 190 {
			t.Errorf("%d pushes, %d unsent, %d unfinished: want 400 in all", r.Total.Pushes, r.Unsent, r.Unfinished)
		}
		if len(r.Doubts()) == 0 {
			t.Error("no doubts")
		}
	})
}

func TestOutcomesAreCounted(t *testing.T) {
	no := refusal(t, codes.ResourceExhausted)
	n := 0
	answers := func(context.Context, proto.Message) (*pubsub.DeliverySummary, error) {
		n++
		switch n % 6 {
		case 0:
			return &pubsub.DeliverySummary{Targets: 3, Delivered: 2, Offline: 1}, nil
		case 1:
			return &pubsub.DeliverySummary{Targets: 1, Offline: 1}, nil
		case 2:
			return &pubsub.DeliverySummary{Targets: 2, Delivered: 1, Failed: 1}, nil
		case 3:
			return &pubsub.DeliverySummary{Targets: 2, Failed: 1, Unknown: 1}, nil
		case 4:
			return nil, no
		default:
			return nil, status.Error(codes.Internal, "who knows")
		}
	}
	inBubble(t, answers, func(c *Config) { c.Rate, c.Duration, n = 60, time.Second, 0 }, func(t *testing.T, _ *server, r *Result) {
		want := Figures{
			Pushes: 60, Outcomes: [outcomes]int64{Delivered: 10, Offline: 10, Failed: 10, Refused: 10, Unknown: 20},
			Codes:   map[codes.Code]int64{codes.ResourceExhausted: 10, codes.Internal: 10},
			Targets: Targets{Targets: 80, Delivered: 30, Offline: 20, Failed: 20, Unknown: 10},
		}
		got := r.Total
		if n := got.Latency.TotalCount(); n != 50 {
			t.Errorf("%d latencies, want those of all but the refused", n)
		}
		got.Latency = nil
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if r.ErrorShare() != 40.0/60 || r.Answered != 40 {
			t.Errorf("errors %v, answered %d", r.ErrorShare(), r.Answered)
		}
	})
}

func TestAPushWithoutAnAnswerEndsUnknownAfterTheTimeout(t *testing.T) {
	never := func(ctx context.Context, _ proto.Message) (*pubsub.DeliverySummary, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	inBubble(t, never, func(c *Config) { c.Rate, c.Duration, c.Timeout = 10, time.Second, 300*time.Millisecond }, func(t *testing.T, _ *server, r *Result) {
		if r.Total.Outcomes[Unknown] != 10 || r.Total.Codes[codes.DeadlineExceeded] != 10 {
			t.Errorf("outcomes %v, codes %v", r.Total.Outcomes, r.Total.Codes)
		}
		within(t, "p50", time.Duration(r.Total.Latency.ValueAtQuantile(50)), 300*time.Millisecond, 410*time.Millisecond)
	})
}

func TestABrokenStreamIsOpenedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		s := start(t, func(context.Context, proto.Message) (*pubsub.DeliverySummary, error) {
			if n++; n == 50 {
				return nil, errBreak
			}
			return &pubsub.DeliverySummary{Targets: 1, Delivered: 1}, nil
		})
		defer s.close()
		cfg := s.config()
		cfg.Way, cfg.Connections = Stream, 1
		res, err := Run(t.Context(), cfg)
		ok(t, err)
		if res.Total.Pushes != 200 || res.Total.Outcomes[Unknown] != 1 || res.Total.Outcomes[Delivered] != 199 || res.Total.Codes[codes.Unavailable] != 1 {
			t.Errorf("%d pushes, outcomes %v, codes %v", res.Total.Pushes, res.Total.Outcomes, res.Total.Codes)
		}
	})
}

func TestAServerThatGoesAwayIsErrorsAndNoHang(t *testing.T) {
	for _, way := range []Way{Unary, Stream} {
		for _, rate := range []float64{100, 0} {
			t.Run(fmt.Sprintf("way=%v/rate=%v", way, rate), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := start(t, func(context.Context, proto.Message) (*pubsub.DeliverySummary, error) {
						time.Sleep(time.Millisecond)
						return &pubsub.DeliverySummary{Targets: 1, Delivered: 1}, nil
					})
					time.AfterFunc(time.Second, s.grpc.Stop)
					defer s.close()
					cfg := s.config()
					cfg.Way, cfg.Rate, cfg.InFlight = way, rate, 1
					res, err := Run(t.Context(), cfg)
					ok(t, err)
					if res.Total.Errors() == 0 || res.Total.Outcomes[Delivered] == 0 {
						t.Errorf("outcomes %v", res.Total.Outcomes)
					}
				})
			})
		}
	}
}

func TestAStopEndsTheRunWithItsResults(t *testing.T) {
	for _, way := range []Way{Unary, Stream} {
		for name, a := range map[string]answer{"answered": nil, "stuck": func(ctx context.Context, _ proto.Message) (*pubsub.DeliverySummary, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}} {
			t.Run(way.String()+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := start(t, a)
					defer s.close()
					cfg := s.config()
					cfg.Way, cfg.Duration, cfg.Timeout, cfg.Warmup = way, time.Hour, time.Minute, time.Second
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					time.AfterFunc(3500*time.Millisecond, cancel)
					begin := time.Now()
					res, err := Run(ctx, cfg)
					ok(t, err)
					within(t, "the run", time.Since(begin), 3500*time.Millisecond, 6*time.Second)
					within(t, "the window", res.Window, 2490*time.Millisecond, 2510*time.Millisecond)
					if n := res.Total.Pushes + res.Unfinished + res.Unsent; !res.Stopped || n < 248 || n > 252 {
						t.Errorf("%d pushes, %d unfinished, %d unsent; stopped %v", res.Total.Pushes, res.Unfinished, res.Unsent, res.Stopped)
					}
					if stuck := a != nil; stuck != (res.Unfinished > 0) {
						t.Errorf("%d unfinished", res.Unfinished)
					}
				})
			})
		}
	}
}

func TestAStopInTheWarmUpMeasuresNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t, nil)
		defer s.close()
		cfg := s.config()
		cfg.Warmup = time.Hour
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := Run(ctx, cfg); !errors.Is(err, ErrNothingMeasured) {
			t.Errorf("got %v", err)
		}
	})
}

func TestTheClosedLoopKeepsAllPlacesBusy(t *testing.T) {
	slow := func(context.Context, proto.Message) (*pubsub.DeliverySummary, error) {
		time.Sleep(10 * time.Millisecond)
		return &pubsub.DeliverySummary{Targets: 1, Delivered: 1}, nil
	}
	synctest.Test(t, func(t *testing.T) {
		s := start(t, slow)
		defer s.close()
		cfg := s.config()
		cfg.Rate, cfg.InFlight, cfg.Duration = 0, 5, time.Second
		res, err := Run(t.Context(), cfg)
		ok(t, err)
		if res.Total.Pushes != 500 || res.Generator.MostInFlight > 5 {
			t.Errorf("%d pushes, %d in flight", res.Total.Pushes, res.Generator.MostInFlight)
		}
	})
}

func TestProgressAndTimelineTellTheSame(t *testing.T) {
	var rates []float64
	inBubble(t, nil, func(c *Config) {
		c.Warmup, rates = time.Second, nil
		c.OnProgress = func(p Progress) { rates = append(rates, p.Rate) }
	}, func(t *testing.T, _ *server, r *Result) {
		if len(rates) < 5 || slices.ContainsFunc(rates[1:5], func(v float64) bool { return v < 90 || v > 110 }) {
			t.Errorf("rates %v", rates)
		}
		var answered int64
		for _, i := range r.Timeline {
			answered += i.Answered
		}
		if len(r.Timeline) < 19 || answered < 195 || answered > 205 {
			t.Errorf("%d intervals with %d answers", len(r.Timeline), answered)
		}
	})
}

func TestTheSameSeedGivesTheSamePushes(t *testing.T) {
	var last []proto.Message
	for range 2 {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, nil)
			defer s.close()
			cfg := s.config()
			cfg.Mix, cfg.Seed, cfg.Poisson = Mix{ToUser: 5, ToRoom: 3, ToUsers: 2, ToAll: 1}, 7, true
			res, err := Run(t.Context(), cfg)
			ok(t, err)
			for _, k := range Kinds() {
				if res.Kinds[k].Pushes == 0 {
					t.Errorf("no %v push", k)
				}
			}
			if last != nil {
				if diff := cmp.Diff(last, s.got, protocmp.Transform()); diff != "" {
					t.Error(diff)
				}
			}
			last = s.got
		})
	}
}

func TestRequestsAreWhatTheySeem(t *testing.T) {
	content := &pubsub.MessageContent{Data: []byte("hello")}
	inBubble(t, nil, func(c *Config) {
		c.Mix, c.UserPattern, c.RoomPattern = Mix{1, 1, 1, 1}, "user-%03d@x", "r%d"
		c.Users, c.Rooms, c.UsersPerPush = 12, 1, 3
	}, func(t *testing.T, s *server, _ *Result) {
		seen := map[string]int{}
		for _, m := range s.got {
			seen[string(m.ProtoReflect().Descriptor().Name())]++
			if len(m.ProtoReflect().GetUnknown()) > 0 {
				t.Errorf("unknown fields in %v", m)
			}
			switch m := m.(type) {
			case *pubsub.PushToUserRequest:
				var n int
				_, err := fmt.Sscanf(m.GetUserId(), "user-%03d@x", &n)
				if ok(t, err); n >= 12 || len(m.GetUserId()) != len("user-000@x") {
					t.Errorf("user %q", m.GetUserId())
				}
			case *pubsub.PushToRoomRequest:
				if m.GetRoomId() != "r0" {
					t.Errorf("room %q", m.GetRoomId())
				}
			case *pubsub.PushToUsersRequest:
				if len(m.GetUserIds()) != 3 {
					t.Errorf("users %q", m.GetUserIds())
				}
			}
			got := m.(interface{ GetContent() *pubsub.MessageContent }).GetContent()
			if diff := cmp.Diff(content, got, protocmp.Transform()); diff != "" {
				t.Fatal(diff)
			}
		}
		if len(seen) != 4 {
			t.Errorf("kinds %v", seen)
		}
	})
}

func TestNobodyThere(t *testing.T) {
	cfg := Config{Addresses: []string{freeport.Addr(t)}, Rate: 1, Mix: Mix{ToAll: 1}, DialOptions: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}}
	if _, err := Run(t.Context(), cfg); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v", err)
	}
}

func TestConfigNamesWhatIsWrong(t *testing.T) {
	cfg := Config{Rate: math.NaN(), Mix: Mix{ToRoom: -1}, UserPattern: "u", RoomPattern: "%d%d", Timeout: -1, InFlight: -1}
	err := cfg.Validate()
	for _, name := range []string{"Addresses", "Rate", "Mix of room", "UserPattern", "RoomPattern", "Timeout", "InFlight"} {
		if err == nil || !slices.ContainsFunc(split(err), func(e error) bool { return len(e.Error()) > 6 && e.Error()[6:6+len(name)] == name }) {
			t.Errorf("no error for %s in %v", name, err)
		}
	}
}

func split(err error) []error { return err.(interface{ Unwrap() []error }).Unwrap() }
