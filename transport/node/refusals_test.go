package node

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/push-manager/push-manager/transport/discovery"
)

func refusalOf(user string, revision int64, length time.Duration) discovery.KnownRefusal {
	return discovery.KnownRefusal{Refusal: discovery.Refusal{User: user, Code: 4410, Reason: fmt.Sprint(revision), Seconds: int64(length / time.Second)}, Revision: revision}
}

func newRefusals(closed *[]string) *refusals {
	return &refusals{byKey: make(map[string]refusal), close: func(d *Disconnect) { *closed = append(*closed, d.User) }}
}

func (t *refusals) reason(user string) string {
	r, refused := t.look(&discovery.Refusal{User: user})
	if !refused {
		return ""
	}
	return r.Reason
}

// TestOfARefusalTheHighestRevisionCounts in whatever order streams and etcd tell it.
func TestOfARefusalTheHighestRevisionCounts(t *testing.T) {
	key := (&discovery.Refusal{User: "u"}).Key()
	news := map[string]func(*refusals){
		"a manager refuses at 5": func(t *refusals) { t.refuse(refusalOf("u", 5, time.Hour), time.Now()) },
		"etcd has 5":             func(t *refusals) { t.Put(key, refusalOf("u", 5, time.Hour)) },
		"a manager lifts at 6":   func(t *refusals) { t.lift(key, 6, time.Now()) },
		"etcd deletes at 6":      func(t *refusals) { t.Delete(key, 6) },
	}
	names := []string{"a manager refuses at 5", "etcd has 5", "a manager lifts at 6", "etcd deletes at 6"}
	var permute func(rest, order []string)
	permute = func(rest, order []string) {
		if len(rest) == 0 {
			var closed []string
			s := newRefusals(&closed)
			for _, name := range order {
				news[name](s)
			}
			if got := s.reason("u"); got != "" {
				t.Errorf("%v: refused at %s", order, got)
			}
			s.refuse(refusalOf("u", 7, time.Hour), time.Now())
			if got := s.reason("u"); got != "7" {
				t.Errorf("%v, then 7: %q", order, got)
			}
			return
		}
		for i, name := range rest {
			permute(slices.Concat(rest[:i], rest[i+1:]), append(slices.Clone(order), name))
		}
	}
	permute(names, nil)
}

func TestARefusalEndsByItselfWhereEtcdIsSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var closed []string
		s := newRefusals(&closed)
		s.refuse(refusalOf("u", 1, 5*time.Second), time.Now())
		time.Sleep(4 * time.Second)
		if s.reason("u") == "" {
			t.Error("it is over too soon")
		}
		r := refusalOf("u", 1, 5*time.Second)
		s.Put(r.Key(), r) // etcd tells it late: it does not begin anew
		time.Sleep(time.Second + time.Millisecond)
		if s.reason("u") != "" {
			t.Error("it is not over")
		}
		time.Sleep(refusalsSweep)
		s.refuse(refusalOf("v", 2, time.Second), time.Now())
		if n := s.size.Load(); n != 1 {
			t.Errorf("%d are kept", n)
		}
	})
}

// TestConnectionsOfWhomOnlyEtcdRefusesAreClosedAfterASecond: the manager's message, which counts them, has not reached the node.
func TestConnectionsOfWhomOnlyEtcdRefusesAreClosedAfterASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var closed []string
		s := newRefusals(&closed)
		list := map[string]discovery.KnownRefusal{}
		for i, user := range []string{"told", "untold", "lifted"} {
			r := refusalOf(user, int64(i+1), time.Hour)
			list[r.Key()] = r
		}
		s.List(list, 3)
		s.refuse(list[(&discovery.Refusal{User: "told"}).Key()], time.Now())
		s.lift((&discovery.Refusal{User: "lifted"}).Key(), 4, time.Now())
		s.Tick()
		if len(closed) > 0 {
			t.Errorf("closed at once: %v", closed)
		}
		time.Sleep(refuseAfter)
		s.Tick()
		s.List(list, 4) // nothing new
		time.Sleep(refuseAfter)
		s.Tick()
		if !slices.Equal(closed, []string{"untold"}) {
			t.Errorf("closed: %v", closed)
		}
	})
}

func TestAListForgetsWhatIsNotThereAndAnEtcdThatHasGoneBackIsBelieved(t *testing.T) {
	var closed []string
	s := newRefusals(&closed)
	r, later := refusalOf("u", 5, time.Hour), refusalOf("v", 9, time.Hour)
	s.Put(r.Key(), r)
	s.refuse(later, time.Now()) // written after the list was read
	s.List(nil, 8)
	if s.reason("u") != "" || s.reason("v") != "9" {
		t.Errorf("u %q, v %q", s.reason("u"), s.reason("v"))
	}
	old := refusalOf("u", 2, time.Hour)
	s.List(map[string]discovery.KnownRefusal{old.Key(): old}, 3)
	if s.reason("u") != "2" || s.reason("v") != "" {
		t.Errorf("after etcd has gone back: u %q, v %q", s.reason("u"), s.reason("v"))
	}
}

// TestWhatWasLiftedKeepsNobodyFromBeingRefused however much of it a node remembers.
func TestWhatWasLiftedKeepsNobodyFromBeingRefused(t *testing.T) {
	var closed []string
	s := newRefusals(&closed)
	for i := range maxRefusals + 10 {
		s.lift((&discovery.Refusal{User: fmt.Sprint("u", i)}).Key(), int64(i+1), time.Now())
	}
	if n := s.size.Load(); n != maxRefusals {
		t.Errorf("%d are remembered", n)
	}
	s.refuse(refusalOf("v", maxRefusals+20, time.Hour), time.Now())
	r := refusalOf("w", maxRefusals+21, time.Hour)
	s.Put(r.Key(), r)
	if s.reason("v") == "" || s.reason("w") == "" {
		t.Error("somebody who is refused gets in")
	}
}
