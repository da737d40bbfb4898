package membership

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/slots"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	// A request with slots has at least one, and no further one past these bounds.
	sendMemberships = 2000
	sendBytes       = 512 << 10
	// A slot that is larger goes one membership at a time: no Controller would take
	// so large a request.
	sendMost = 3 << 20
)

// errOtherStore says that what was sent before went to another store.
var errOtherStore = errors.New("the controller has forgotten meanwhile")

// syncState is what the Reporter knows of a Controller that has SyncNode. Guarded by
// Reporter.mu.
type syncState struct {
	can      bool   // it has
	absent   bool   // it has not, and said so
	store    string // its store, once it has been told
	unsent   map[uint32]struct{}
	complete bool // store has been told everything
}

// syncLoop compares now and then.
func (r *Reporter) syncLoop(ctx context.Context) {
	for {
		d := r.cfg.SyncInterval
		if r.Ready() {
			more, err := r.sync(ctx)
			switch {
			case more:
				d = min(d, 20*time.Millisecond) // What was left out is under way.
			case err != nil:
				d = min(d, time.Second)
			}
		}
		timer := time.NewTimer(d)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-r.compare:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

func (r *Reporter) compareNow() {
	select {
	case r.compare <- struct{}{}:
	default:
	}
}

// greet is the first comparison over a new connection: it finds out whether the
// Controller can compare, and whether it is the one from before.
func (r *Reporter) greet(ctx context.Context) error {
	err := r.ask(ctx)
	code := status.Code(err)
	r.mu.Lock()
	r.syncing.can, r.syncing.absent = err == nil, code == codes.Unimplemented
	r.mu.Unlock()
	switch code {
	case codes.Unavailable, codes.Canceled, codes.Aborted:
		return err
	default:
		return nil // One that does not answer may be a Controller that does not know it.
	}
}

// sync compares once and sends what differs. more means that it is to be called
// again soon.
func (r *Reporter) sync(ctx context.Context) (more bool, err error) {
	r.mu.Lock()
	absent, completed := r.syncing.absent, r.syncing.complete
	r.mu.Unlock()
	if absent {
		return false, nil
	}
	if err = r.ask(ctx); err == nil {
		r.mu.Lock()
		r.syncing.can = true
		r.mu.Unlock()
	}
	for sent := true; sent && err == nil; {
		sent, err = r.send(ctx)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil || completed && r.syncing.complete || len(r.rejoin) > 0 {
		return false, err
	}
	r.syncing.complete = len(r.syncing.unsent) == 0
	return true, nil // To say that it is complete, or because a slot had to wait.
}

// ask sends the digests and learns which slots differ.
func (r *Reporter) ask(ctx context.Context) error {
	r.mu.Lock()
	request := &pubsub.SyncNodeRequest{NodeId: r.cfg.NodeID, BootId: r.cfg.BootID, Digests: make([]uint64, slots.Count)}
	for i := range r.slots {
		request.Digests[i] = r.slots[i].digest
	}
	if r.syncing.complete {
		request.ReportedTo = r.syncing.store
	}
	r.mu.Unlock()
	return r.exchange(ctx, request)
}

// send sends some of the slots that differ, and tells whether there were any. A
// slot for which a call is under way has to wait: whether the Controller has
// executed it is not known, and what is not listed ends. It does not wait while the
// store has not been told everything, for the Controller may not answer the call
// before: what it ends then is reported again before the client is told.
func (r *Reporter) send(ctx context.Context) (sent bool, err error) {
	request := &pubsub.SyncNodeRequest{NodeId: r.cfg.NodeID, BootId: r.cfg.BootID}
	members, bytes := 0, 0
	r.mu.Lock()
	for i := range r.syncing.unsent {
		s := &r.slots[i]
		if s.busy > 0 && r.syncing.complete {
			continue
		}
		list, size := &pubsub.NodeSlot{Slot: i}, 0
		for _, m := range s.members {
			if m.counted {
				list.Memberships = append(list.Memberships, &pubsub.NodeMembership{UserId: m.user, RoomId: m.room, UserName: m.name})
				size += len(m.user) + len(m.room) + len(m.name) + 16
			}
		}
		if size > sendMost {
			delete(r.syncing.unsent, i)
			for _, m := range s.members {
				if m.counted && !m.again {
					m.again = true
					r.rejoin = append(r.rejoin, m)
				}
			}
			continue
		}
		if members, bytes = members+len(list.GetMemberships()), bytes+size; len(request.GetSlots()) > 0 && (members > sendMemberships || bytes > sendBytes) {
			break
		}
		for _, m := range s.members {
			m.again = m.again || m.busy
		}
		r.seq++
		list.Seq = r.seq
		request.Slots = append(request.Slots, list)
		delete(r.syncing.unsent, i) // Unless the reply says that it was not taken.
	}
	r.mu.Unlock()
	if len(request.GetSlots()) == 0 {
		return false, nil
	}
	if err := r.exchange(ctx, request); err != nil {
		r.mu.Lock()
		for _, list := range request.GetSlots() {
			r.unsentLocked(list.GetSlot())
		}
		r.mu.Unlock()
		return false, err
	}
	r.count.slots.Add(len(request.GetSlots()))
	return true, nil
}

func (r *Reporter) unsentLocked(slot uint32) {
	if r.syncing.unsent == nil {
		r.syncing.unsent = make(map[uint32]struct{})
	}
	r.syncing.unsent[slot] = struct{}{}
}

// exchange makes one call and notes what differs.
func (r *Reporter) exchange(ctx context.Context, request *pubsub.SyncNodeRequest) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	reply, err := r.client.SyncNode(ctx, request)
	if err != nil {
		return fmt.Errorf("compare with controller: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if reply.GetStoreId() != r.syncing.store {
		if r.syncing.store != "" {
			r.count.rejoins.Inc()
		}
		r.syncing.store, r.syncing.complete = reply.GetStoreId(), false
		if len(request.GetDigests()) == 0 {
			r.compareNow()
			return errOtherStore
		}
	}
	for _, i := range reply.GetDiffering() {
		if i < slots.Count {
			r.unsentLocked(i)
		}
	}
	return nil
}
