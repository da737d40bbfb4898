package faultbench

import (
	"cmp"
	"context"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

// stream pushes a list of requests through one PushStream without waiting for
// answers, and returns when all are answered or the stream is broken. What then has no
// answer has ended with the stream's error: it may have been sent.
func (m *manager) stream(requests []request) []*push {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	name := fmt.Sprint(m.id, " stream ", m.streams.Add(1))
	pushes := make([]*push, len(requests))
	for i, r := range requests {
		pushes[i] = &push{kind: r.kind, key: r.key, users: r.users, options: r.options, manager: m.id, stream: name, place: i + 1, limit: defaultDeadline}
		if r.patient { // the stream itself has all patience
			pushes[i].limit = r.deadline
		}
	}
	s, err := m.PushStream(ctx, grpc.WaitForReady(true))
	if err != nil {
		return nil // the Push-Manager is away, and nothing was asked for
	}
	var begun sync.Mutex // how many of pushes have been asked for
	asked := 0
	var sender sync.WaitGroup
	sender.Go(func() {
		for i, p := range pushes {
			begun.Lock()
			m.b.ledger.begin(p)
			asked = i + 1
			begun.Unlock()
			if s.Send(streamed(uint64(i), p, requests[i])) != nil {
				return // Recv says why
			}
		}
		_ = s.CloseSend()
	})
	answered := make([]bool, len(pushes))
	for {
		var r *pubsub.PushStreamResponse
		if r, err = s.Recv(); err != nil {
			break
		}
		answered[r.GetId()] = true
		pushes[r.GetId()].message = cmp.Or(r.GetToRoom().GetMessage(), r.GetToUser().GetMessage())
		m.b.ledger.answer(pushes[r.GetId()], successOf(r), summaryOf(r), status.ErrorProto(r.GetError()))
	}
	cancel()
	sender.Wait()
	for i, p := range pushes[:asked] {
		if !answered[i] {
			m.b.ledger.answer(p, false, nil, err)
		}
	}
	return pushes[:asked]
}

func streamed(id uint64, p *push, r request) *pubsub.PushStreamRequest {
	content := &pubsub.MessageContent{Data: payload(p.id, r.size)}
	q := &pubsub.PushStreamRequest{Id: id}
	switch r.kind {
	case toUser:
		q.Push = &pubsub.PushStreamRequest_ToUser{ToUser: &pubsub.PushToUserRequest{UserId: r.key, Content: content, Options: p.options}}
	case toUsers:
		q.Push = &pubsub.PushStreamRequest_ToUsers{ToUsers: &pubsub.PushToUsersRequest{UserIds: r.users, Content: content, Options: p.options}}
	case toRoom:
		q.Push = &pubsub.PushStreamRequest_ToRoom{ToRoom: &pubsub.PushToRoomRequest{RoomId: r.key, Content: content, Options: p.options}}
	case toAll:
		q.Push = &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: content, Options: p.options}}
	}
	return q
}

func successOf(r *pubsub.PushStreamResponse) bool {
	return r.GetToUser().GetSuccess() || r.GetToUsers().GetSuccess() || r.GetToRoom().GetSuccess() || r.GetBroadcast().GetSuccess()
}

func summaryOf(r *pubsub.PushStreamResponse) *pubsub.DeliverySummary {
	for _, s := range []*pubsub.DeliverySummary{
		r.GetToUser().GetSummary(), r.GetToUsers().GetSummary(), r.GetToRoom().GetSummary(), r.GetBroadcast().GetSummary(),
	} {
		if s != nil {
			return s
		}
	}
	return nil
}
