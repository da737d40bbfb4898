package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pubsub "github.com/push-manager/push-manager/proto"
)

func unaryChecks() []check {
	return []check{
		{name: "unary/user", expect: "PushMessage: success for a user who is here, success=false and status OK for one who is not", run: unaryUser},
		{name: "unary/batch", expect: "PushMessageBatch: delivered_count and the users named add up to the users asked for", run: unaryBatch},
		{name: "unary/empty", expect: "an empty user_id, and an empty user_ids, are errors which say that nothing was done, and never everybody", run: unaryEmpty},
		{name: "unary/broadcast", expect: "Broadcast reaches every user here and counts users", run: unaryBroadcast},
		{name: "unary/order", expect: "calls one after the other reach a user in their order", users: 1, clients: true, run: unaryOrder},
	}
}

// refuses tells whether a code says that the node did nothing.
func refuses(code codes.Code) bool {
	return slices.Contains([]codes.Code{codes.Unimplemented, codes.InvalidArgument, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated, codes.ResourceExhausted}, code)
}

// unaryWorks tells whether the unary methods are there.
func (t *tester) unaryWorks(ctx context.Context) error {
	content, _ := t.content()
	_, err := t.api.PushMessage(ctx, &pubsub.PushMessageRequest{UserId: t.cfg.Absent, Content: content})
	return err
}

// unary is the error of a unary method, or the word that the node does without them.
func (t *tester) unary(err error) error {
	if t.streaming && status.Code(err) == codes.Unimplemented {
		return &skipped{"the node has the Deliver stream and not the unary methods"}
	}
	return err
}

func unaryUser(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, 3*t.cfg.Within)
	defer cancel()
	for _, user := range append([]string{t.cfg.Absent}, t.cfg.Users...) {
		content, token := t.content()
		r, err := t.api.PushMessage(ctx, &pubsub.PushMessageRequest{UserId: user, RoomId: t.cfg.Room, Content: content})
		if err != nil {
			return t.unary(err)
		}
		if r.GetSuccess() != (user != t.cfg.Absent) {
			return fmt.Errorf("user %q: success is %t (%s)", user, r.GetSuccess(), r.GetMessage())
		}
		if r.GetSuccess() && t.cfg.Client != nil {
			if err := t.arrived.until(ctx, user, token); err != nil {
				return err
			}
		}
	}
	return nil
}

func unaryBatch(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, 3*t.cfg.Within)
	defer cancel()
	strangers := append(t.strangers(3, 0), t.cfg.Absent)
	for _, users := range [][]string{strangers, t.cfg.Users, slices.Concat(strangers, t.cfg.Users)} {
		if len(users) == 0 {
			continue
		}
		content, _ := t.content()
		r, err := t.api.PushMessageBatch(ctx, &pubsub.PushMessageBatchRequest{UserIds: users, RoomId: t.cfg.Room, Content: content})
		if err != nil {
			return t.unary(err)
		}
		here, missing := 0, []string{}
		for _, user := range users {
			if slices.Contains(t.cfg.Users, user) {
				here++
			} else {
				missing = append(missing, user)
			}
		}
		failed := slices.Sorted(slices.Values(r.GetFailedUserIds()))
		slices.Sort(missing)
		if int(r.GetDeliveredCount()) != here || !slices.Equal(failed, missing) || len(r.GetUnreachedUserIds()) > 0 {
			return fmt.Errorf("to %d users, %d of them here: delivered_count is %d, failed_user_ids are %s, unreached_user_ids %s",
				len(users), here, r.GetDeliveredCount(), some(failed), some(r.GetUnreachedUserIds()))
		}
	}
	return nil
}

func unaryEmpty(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, 3*t.cfg.Within)
	defer cancel()
	if err := t.unary(t.unaryWorks(ctx)); err != nil {
		return err
	}
	content, token := t.content()
	_, one := t.api.PushMessage(ctx, &pubsub.PushMessageRequest{Content: content})
	_, many := t.api.PushMessageBatch(ctx, &pubsub.PushMessageBatchRequest{Content: content})
	for what, err := range map[string]error{"PushMessage": one, "PushMessageBatch": many} {
		if err == nil {
			return errors.New(what + " for nobody is no error")
		}
		if code := status.Code(err); !refuses(code) {
			return fmt.Errorf("%s for nobody is %v, which does not say that nothing was done", what, code)
		}
	}
	return t.nobody(ctx, token, t.cfg.Users...)
}

func unaryBroadcast(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, 3*t.cfg.Within)
	defer cancel()
	content, token := t.content()
	r, err := t.api.Broadcast(ctx, &pubsub.BroadcastRequest{Content: content})
	if err != nil {
		return t.unary(err)
	}
	if int(r.GetDeliveredCount()) < len(t.cfg.Users) {
		return fmt.Errorf("delivered_count is %d, and at least %d users are connected (%s)", r.GetDeliveredCount(), len(t.cfg.Users), r.GetMessage())
	}
	if t.cfg.Client == nil {
		return nil
	}
	for _, user := range t.cfg.Users {
		if err := t.arrived.until(ctx, user, token); err != nil {
			return err
		}
	}
	return nil
}

func unaryOrder(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second+t.cfg.Within)
	defer cancel()
	user := t.cfg.Users[0]
	var tokens []string
	for range 50 {
		content, token := t.content()
		if _, err := t.api.PushMessage(ctx, &pubsub.PushMessageRequest{UserId: user, Content: content}); err != nil {
			return t.unary(err)
		}
		tokens = append(tokens, token)
	}
	for _, token := range tokens {
		if err := t.arrived.until(ctx, user, token); err != nil {
			return err
		}
	}
	return t.arrived.inOrder(user, tokens)
}
